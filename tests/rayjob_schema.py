"""The part of KubeRay's schema of a RayJob that k8s/prepare-rayjob.yaml uses.

    python tests/rayjob_schema.py ray.io_rayjobs.yaml        # writes tests/rayjob_schema.json again

The whole schema, the CustomResourceDefinition of the KubeRay operator, has 2 MB. Of each object, only the fields that
the manifest has are kept. Another field is an error, so a new field of the manifest needs a new extract.
"""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
MANIFEST = ROOT / "k8s/prepare-rayjob.yaml"
EXTRACT = Path(__file__).with_suffix(".json")
VERSION = "v1"


def rayjob() -> dict[str, Any]:
    """The RayJob in the manifest."""
    resources = yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8"))
    (found,) = [resource for resource in resources if resource["kind"] == "RayJob"]
    return dict(found)


def read_crd(path: Path) -> dict[str, Any]:
    """The schema in a CustomResourceDefinition (YAML, plain or .gz)."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    versions = yaml.load(content, yaml.CSafeLoader)["spec"]["versions"]
    (schema,) = [version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == VERSION]
    return dict(schema)


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, with unknown fields as errors, as Kubernetes has it for `kubectl apply`."""
    result = {name: value for name, value in schema.items() if name not in ("description", "default")}
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
        result["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in schema:
        result["properties"] = {name: closed(part) for name, part in schema["properties"].items()}
        result["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            result[name] = closed(schema[name])
    return {name: value for name, value in result.items() if not name.startswith("x-kubernetes") and name != "format"}


def extract(schema: dict[str, Any], values: list[Any]) -> dict[str, Any]:
    """The part of a closed schema that these values use."""
    result = dict(schema)
    if "properties" in schema:
        used = sorted({name for value in values for name in value} & schema["properties"].keys())
        result["properties"] = {
            name: extract(schema["properties"][name], [value[name] for value in values if name in value])
            for name in used
        }
        if "required" in schema:
            result["required"] = [name for name in schema["required"] if name in used]
    if isinstance(schema.get("items"), dict):
        result["items"] = extract(schema["items"], [item for value in values for item in value])
    return result


def unwritten_defaults(schema: dict[str, Any], value: Any, path: str = "") -> list[str]:
    """Fields that Kubernetes would add. In a list, they make `kubectl apply --server-side` find a conflict."""
    found = []
    if isinstance(value, dict):
        for name, part in schema.get("properties", {}).items():
            if name in value:
                found += unwritten_defaults(part, value[name], f"{path}.{name}")
            elif "default" in part:
                found.append(f"{path}.{name}")
    elif isinstance(value, list):
        for item in value:
            found += unwritten_defaults(schema.get("items", {}), item, path)
    return found


def extract_of(crd: Path) -> dict[str, Any]:
    """The extract that belongs to the manifest."""
    schema = closed(read_crd(crd))
    schema["properties"]["metadata"] = {"type": "object"}  # any object has these; the definition leaves them out
    return extract(schema, [rayjob()])


if __name__ == "__main__":
    EXTRACT.write_text(json.dumps(extract_of(Path(sys.argv[1])), indent=1, sort_keys=True) + "\n")
