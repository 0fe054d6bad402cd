#!/bin/sh
# Write requirements/cpu.txt and cuda.txt from pyproject.toml: versions alone, no registry, no hashes.
# Usage: resolve.sh UV
set -eu
uv=$1
trap 'rm -f uv.lock' EXIT
"$uv" lock --quiet --upgrade
for engine in cpu cuda; do
    {
        echo "# Written by \`make pins\` from pyproject.toml; installed with --no-deps."
        "$uv" export --quiet --locked --extra "$engine" --extra demo \
            --no-hashes --no-emit-project --no-header --no-annotate |
            sed "s/ ; platform_machine == 'x86_64' and sys_platform == 'linux'\$//"
    } >"requirements/$engine.txt"
done
