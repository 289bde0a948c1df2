#!/bin/bash
cat > /app/rotate.sh <<'END'
[[ -d $1 && $2 =~ ^[0-9]+$ && $2 -ge 1 ]] || exit 2
cd -- "$1" || exit 2
ls | grep -E '^backup-[0-9]{4}-[0-9]{2}-[0-9]{2}\.tar$' | sort | head -n "-$2" | while read -r name; do
    rm -- "$name" && echo "$name"
done
END
