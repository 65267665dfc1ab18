# docs/insight.md's runs, about four hours on two cores; killed, the same command goes on where it was.
#
#   sh runs/ablations.sh
set -e
test -e data/shakespeare_char/val.bin || python data/shakespeare_char/prepare.py
for question in base attention experts balance MTP optimizer router initialisation precision; do
    python runs/ablations.py run --only=$question
done
python runs/ablations.py time
python runs/ablations.py report
