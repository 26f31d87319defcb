"""The scripts of tab completion, one for each shell: each asks `completion SHELL --line LINE` for the candidates.

`make` and `python -m` complete as before, except for Assay's own commands. argcomplete and shtab do not fit: they
read an argparse parser, and a stage takes Hydra's key=value.
"""

from __future__ import annotations

import shlex
import sys

from . import MAIN

BASH = r"""# Tab completion of Assay for bash.
_assay() {
    local word
    COMPREPLY=()
    while IFS= read -r word; do [[ -z $word ]] || COMPREPLY+=("$word"); done < <(
        @COMMAND@ completion bash --line "${COMP_LINE:0:COMP_POINT}" "$COMP_WORDBREAKS" 2>/dev/null)
}
_assay_or_other() {
    if [[ $1 == *make && -f scripts/target.py && -f src/main.py || $COMP_LINE == *" -m @MAIN@ "* ]]; then
        _assay
        return
    fi
    compopt +o nospace 2>/dev/null
    local name=${1##*/} load saved
    saved=_assay_before_$name
    if [[ -z ${!saved} ]]; then  # load what completes this command without Assay, and keep it
        for load in _comp_load _completion_loader; do
            declare -F $load >/dev/null && { $load "$name" >/dev/null 2>&1; break; }
        done
        printf -v "$saved" '%s' "$(_assay_function "$name")"
        complete -o nospace -o bashdefault -o default -F _assay_or_other "$name"
    fi
    [[ ${!saved} != none ]] && ${!saved} "$@"
}
_assay_function() {
    local known
    known=$(complete -p "$1" 2>/dev/null)
    if [[ $known == *" -F "* && $known != *_assay_or_other* ]]; then
        known=${known##* -F }
        printf '%s' "${known%% *}"
    else
        printf none
    fi
}
complete -o nospace -F _assay assay
for _assay_name in make python python3; do
    _assay_found=$(_assay_function $_assay_name)
    [[ $_assay_found == none ]] || printf -v "_assay_before_$_assay_name" '%s' "$_assay_found"
    complete -o nospace -o bashdefault -o default -F _assay_or_other $_assay_name
done
unset _assay_name _assay_found
"""

ZSH = r"""#compdef assay
# Tab completion of Assay for zsh.
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
_assay() {
    local -a done open
    local word about
    while IFS=$'\t' read -r word about; do
        if [[ $word == *[=/.] ]]; then
            open+=("${word//:/\\:}:$about")
        else
            done+=("${word//:/\\:}:$about")
        fi
    done < <(@COMMAND@ completion zsh --line "${(j: :)words[1,CURRENT-1]} $PREFIX" 2>/dev/null)
    _describe -V assay done -- open -S ''
}
_assay_or_other() {
    if [[ $words[1] == *make && -f scripts/target.py && -f src/main.py || "$words" == *' -m @MAIN@ '* ]]; then
        _assay
    else
        local other=${_assay_before[${words[1]:t}]:-_default}
        $other "$@"
    fi
}
typeset -gA _assay_before
for _assay_name in make python python3; do
    [[ ${_comps[$_assay_name]} == _assay_or_other ]] || _assay_before[$_assay_name]=${_comps[$_assay_name]}
done
unset _assay_name
compdef _assay assay
compdef _assay_or_other make python python3
"""

FISH = r"""# Tab completion of Assay for fish.
function __assay_candidates
    @COMMAND@ completion fish --line (commandline -cp) 2>/dev/null
end
function __assay_here
    string match -q -- '* -m @MAIN@ *' (commandline -cp); and return
    string match -qr -- '^(\S+/)?make ' (commandline -cp); and test -f scripts/target.py -a -f src/main.py
end
complete -c assay -k -f -a '(__assay_candidates)'
complete -c make -n __assay_here -k -f -a '(__assay_candidates)'
complete -c python -n __assay_here -k -f -a '(__assay_candidates)'
complete -c python3 -n __assay_here -k -f -a '(__assay_candidates)'
"""

SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def script(shell: str) -> str:
    """The script of a shell. It calls the Python that runs now."""
    command = f"{shlex.quote(sys.executable)} -m {MAIN}"
    return SCRIPTS[shell].replace("@COMMAND@", command).replace("@MAIN@", MAIN).strip()
