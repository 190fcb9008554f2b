#!/bin/sh
# Remove from a virtual environment what neither training nor serving uses: pip, tests and headers of libraries, and the
# definitions of all AWS services except S3 and those that provide credentials.
set -eu
cd "$1"/lib/python3*/site-packages
rm -rf pip pip-*.dist-info "$1"/bin/pip* torch/include torch/share torch/test pyarrow/include numpy/_core/include
for package in llvmlite mpmath networkx numba numpy pandas psutil pyarrow sympy; do
  [ ! -d "$package" ] || find "$package" -type d -name tests -prune -exec rm -rf {} +
done
find . -name '*.a' -delete
find botocore/data -mindepth 1 -maxdepth 1 -type d ! -name s3 ! -name sts ! -name 'sso*' ! -name signin \
  -exec rm -rf {} +
