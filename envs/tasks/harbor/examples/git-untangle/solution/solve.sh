#!/bin/bash
set -e
cd /app/repo
git reset -q --soft HEAD~1
git reset -q
git commit -q -m 'change a' a.txt
git add b.txt
git commit -q -m 'add b'
