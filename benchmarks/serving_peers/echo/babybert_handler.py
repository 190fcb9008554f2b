"""A handler without a model: what the server alone can do with these settings."""

from typing import Any


class EchoHandler:
    """TorchServe calls `initialize` once and `handle` for each batch."""

    def initialize(self, context: Any) -> None:
        """There is nothing to load."""

    def handle(self, rows: list[dict[str, Any]], context: Any) -> list[str]:
        """The same answer for each row."""
        return ['{"masks": []}'] * len(rows)
