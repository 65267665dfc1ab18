# docs/insight.md's runs, four to five hours on two cores; killed, the same command goes on where it was.
#
#   sh runs/ablations.sh
set -e
test -e data/shakespeare_char/val.bin || python data/shakespeare_char/prepare.py
python runs/ablations.py run --size=small --seeds=5
python runs/ablations.py run --size=large
python runs/ablations.py time
python runs/ablations.py report
