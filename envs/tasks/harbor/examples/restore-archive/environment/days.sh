set -e
mkdir -p vault /tmp/day
cd /tmp/day
pack() { tar -czf "$OLDPWD/vault/$1.tar.gz" *; }
echo 'plan v1' > plan.txt; echo 'notes v1' > notes.txt; echo 'code v1' > code.txt; pack monday
echo 'notes v2' > notes.txt; echo 'code v2' > code.txt; sha256sum plan.txt notes.txt > sums; sha256sum code.txt >> sums; grep . sums > "$OLDPWD/vault/SHA256SUMS"; rm sums; pack tuesday
echo 'notes dam\x00ged' > notes.txt; echo 'plan dam\x00ged' > plan.txt; pack wednesday
cd "$OLDPWD"; rm -r /tmp/day
