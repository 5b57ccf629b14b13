#!/usr/bin/env bash
# Debian's chromium and its driver, where they are missing and root may install them; else nothing.
#   tests/pages/install.sh [--postgres]      with PostgreSQL too, for the slow tests of MLflow's server
set -euo pipefail
packages=()
command -v chromium >/dev/null && command -v chromedriver >/dev/null ||
    packages+=(chromium chromium-driver fonts-dejavu-core)
if [ "${1:-}" = --postgres ] && [ ! -x "$(ls -d /usr/lib/postgresql/*/bin/initdb 2>/dev/null | tail -1)" ]; then
    packages+=(postgresql)
fi
[ ${#packages[@]} -eq 0 ] && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "not installed: ${packages[*]}; tests that need them fail or skip" >&2
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
wait=(-o DPkg::Lock::Timeout=300 -qq)
apt-get "${wait[@]}" update
apt-get "${wait[@]}" install -y --no-install-recommends "${packages[@]}" >/dev/null
