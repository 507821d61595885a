#!/usr/bin/env bash
# Renders the docstrings of xbai and verl as pages, to outputs/docs/index.html or into another folder.
#
#   bash scripts/docs.sh                       every module of both packages
#   bash scripts/docs.sh FOLDER                into another folder
#   bash scripts/docs.sh FOLDER xbai.sprm ...  some of them, with what is in them
#
# It takes the environment that setup.sh made ($XBAI_VENV, .venv) or else the `python` at hand. It imports what it renders:
# vLLM's part of the engines is left out where there is no vLLM.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source scripts/environment.sh
bin=$(realpath -m "$venv")/bin
[[ -x $bin/python ]] && export PATH=$bin:$PATH
python=$(type -P python3 || type -P python) || { echo "error: no python here; run: bash scripts/setup.sh" >&2; exit 2; }
has() { "$python" -c "import importlib.util as i, sys; sys.exit(i.find_spec('$1') is None)"; }
has pdoc || { echo "error: $python lacks pdoc; run: pip install -r requirements-dev.txt" >&2; exit 2; }

folder=${1:-outputs/docs}
# By name: of a package that says what it exports pdoc would render nothing else.
files=$(find xbai -name '*.py'; cd verl && find verl -name '*.py')
modules=$(sed '/\/__main__\.py$/d; s/\.py$//; s/\/__init__$//; s/\//./g' <<<"$files" | sort)
has vllm || modules=$(grep -v '^xbai\.engine\.vllm' <<<"$modules")
if (($# > 1)); then
    wanted=$(IFS='|' && echo "${*:2}")
    modules=$(grep -E "^(${wanted//./\\.})(\.|$)" <<<"$modules") || { echo "error: no module ${*:2}" >&2; exit 2; }
fi
export PYTHONPATH=$PWD:$PWD/verl${PYTHONPATH:+:$PYTHONPATH} CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
# A package that is rendered brings modules that are named as well; of a NamedTuple pdoc does not find the annotations.
export PYTHONWARNINGS="ignore:The module specification,ignore:Error parsing type annotation"

# shellcheck disable=SC2086 (one word a module)
"$python" -m pdoc --docformat google --no-show-source --output-directory "$folder" $modules
echo "$folder/index.html"
