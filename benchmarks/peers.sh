#!/bin/sh
# Makes the virtual environments of the libraries that foretaste is timed against.
#
#   sh benchmarks/peers.sh             # all
#   sh benchmarks/peers.sh rectools    # one of them
#
# They are in .peers/ next to this folder, separate from foretaste's own, because each peer pins an
# older numpy. torch is installed first and alone, so that a CPU build (see the Makefile) already
# meets the peer's requirement of "torch". Existing environments are checked and kept.
set -eu

cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3.11}"
PIP="python -m pip --disable-pip-version-check"

say() { printf 'peers: %s\n' "$*"; }

# make NAME "IMPORT CHECK" REQUIREMENT...
make() {
  name="$1" check="$2" folder=".peers/$1"
  shift 2
  if [ -x "$folder/bin/python" ] && "$folder/bin/python" -W ignore -c "$check" 2>/dev/null; then
    say "$folder stands already:"
  else
    say "making $folder"
    "$PYTHON" -m venv --clear "$folder"
    "$folder/bin/"$PIP install --quiet 'torch==2.13.*'
    "$folder/bin/"$PIP install --quiet "$@"
    "$folder/bin/python" -W ignore -c "$check"
    say "made $folder:"
  fi
  "$folder/bin/"$PIP list --format=freeze 2>/dev/null |
    grep -iE '^(torch|torch[-_]geometric|numpy|scipy|pandas|rectools|pytorch-lightning|recbole|implicit|deepctr[-_]torch|torch[-_]rechub)=' |
    sed 's/^/  /'
}

rectools() {
  # pytorch-lightning is held at the release that RecTools 0.19 was made for: later releases
  # of that family have been tampered with.
  make rectools 'from rectools.models import SASRecModel' \
    'torch==2.13.*' 'rectools[torch]==0.19.*' 'pytorch-lightning==2.5.2'
}

recbole() {
  # RecBole 1.2.1 reads its own checkpoints in a way that torch refuses since 2.6: run it with
  # TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1, or with saved=False.
  make recbole 'from recbole.quick_start import run_recbole' \
    'torch==2.13.*' 'recbole==1.2.1' 'numpy<2' 'scipy<1.13' 'pandas<2.3' 'setuptools<81'
}

pyg() {
  # Without torch-sparse, torch-scatter or pyg-lib, which have no wheels for this torch: PyG then
  # gathers and scatters, or multiplies by torch's own sparse matrix.
  make pyg 'from torch_geometric.nn import LightGCN' 'torch==2.13.*' 'torch_geometric==2.*'
}

deepctr() {
  make deepctr 'from deepctr_torch.models import DeepFM' \
    'torch==2.13.*' 'deepctr-torch==0.3.*' 'requests'
}

rechub() {
  make rechub 'from torch_rechub.models.ranking import DeepFM' 'torch==2.13.*' 'torch-rechub==0.9.*'
}

implicit() {
  make implicit 'from implicit.bpr import BayesianPersonalizedRanking' 'implicit==0.7.*' 'scipy<2'
}

for peer in ${*:-rectools recbole pyg implicit deepctr rechub}; do
  case "$peer" in
    rectools | recbole | pyg | implicit | deepctr | rechub) "$peer" ;;
    *) say "no peer is called $peer: rectools, recbole, pyg, implicit, deepctr or rechub" >&2; exit 2 ;;
  esac
done
