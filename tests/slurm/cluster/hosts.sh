#!/usr/bin/env bash
# The one change outside the cluster's own folder: a marked block of the hosts file with the nodes' names.
#   hosts.sh add NODES | remove
set -euo pipefail
file=/etc/hosts
rest=$(sed '/# coatnet cluster begin/,/# coatnet cluster end/d' "$file")
{ # written in place, not renamed: it may be a bind mount
    printf '%s\n' "$rest"
    if [ "$1" = add ]; then
        echo "# coatnet cluster begin"
        for ((i = 1; i <= $2; i++)); do echo "127.0.10.$i n$i"; done
        echo "# coatnet cluster end"
    fi
} >"$file"
