"""`zramd completion`: a script for the shell that completes verbs, options, devices and settings.

It is made from the parser, so it knows each verb that there is. What changes, the names of running devices,
the script looks up itself: starting Python for each press of the tab key would be felt.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from zramd.commands import VERBS, Commands, Parser, parser, parts, verb_parser
from zramd.control.columns import COLUMNS
from zramd.settings import config

# {values}, {verbs}, {nested} and {offers} are put in.
# bash and zsh: from $verb and $previous to the words that are offered.
_OFFERS = """\
    case "$verb $previous" in
{values}    *)
        case $verb in
{verbs}        esac
        ;;
    esac
    if [[ $offers == *@devices* ]]; then
        offers=${offers/@devices/}
        folder=/run/zramd
        ((EUID)) && folder=${XDG_RUNTIME_DIR:-/nonexistent}/zramd
        for file in "$folder"/*/pid; do
            device=${file%/pid}
            [[ -e $file ]] && offers+=" ${device##*/}"
        done
    fi
"""
_BASH = """\
# bash completion for zramd, made by 'zramd completion bash'
_zramd() {
    local word=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]}
    local verb='' offers='' folder device file
    [[ $word == = || $previous == = ]] && return
    ((COMP_CWORD > 1)) && verb=${COMP_WORDS[1]}
    if ((COMP_CWORD > 2)); then
        case "$verb ${COMP_WORDS[2]}" in
        {nested}) verb+=" ${COMP_WORDS[2]}" ;;
        esac
    fi
{offers}    mapfile -t COMPREPLY < <(
        compgen -W "${offers/@files/}" -- "$word"
        [[ $offers != *@files* ]] || compgen -f -- "$word"
    )
    [[ ${COMPREPLY[0]-} == *= ]] && compopt -o nospace
}
complete -F _zramd zramd
"""
_ZSH = """\
#compdef zramd
# zsh completion for zramd, made by 'zramd completion zsh'
_zramd() {
    local previous=$words[CURRENT-1] verb='' offers='' folder device file
    ((CURRENT > 2)) && verb=$words[2]
    if ((CURRENT > 3)); then
        case "$verb $words[3]" in
        {nested}) verb+=" $words[3]" ;;
        esac
    fi
{offers}    local -a found=(${=offers/@files/})
    compadd -- ${found:#*=}
    compadd -S '' -- ${(M)found:#*=}
    [[ $offers != *@files* ]] || _files
}
if [[ $funcstack[1] == _zramd ]]; then _zramd; else compdef _zramd zramd; fi
"""
_FISH = """\
# fish completion for zramd, made by 'zramd completion fish'
function _zramd
    set -l before (commandline -opc)
    set -l verb "$before[2]"
    set -l offers
    contains -- "$verb $before[3]" {nested}; and set verb "$verb $before[3]"
    switch "$verb $before[-1]"
{values}    case '*'
        switch $verb
{verbs}        end
    end
    for offer in $offers
        switch $offer
        case @devices
            set -l folder /run/zramd
            test (id -u) = 0; or set folder "$XDG_RUNTIME_DIR/zramd"
            for file in $folder/*/pid
                string replace --regex '.*/(.*)/pid' '$1' $file
            end
        case @files
            __fish_complete_path (commandline -ct)
        case '*'
            printf '%s\\n' $offer
        end
    end
end
complete -c zramd -f -a '(_zramd)'
"""


class Shell(NamedTuple):
    """How a shell's script is written."""

    script: str
    case: str  # from some texts to the words offered then
    one_of: str  # between two texts of a case


SHELLS = {
    "bash": Shell(_BASH, '{texts}) offers="{words}" ;;', " | "),
    "zsh": Shell(_ZSH, '{texts}) offers="{words}" ;;', " | "),
    "fish": Shell(_FISH, "case {texts}; set offers {words}", " "),
}
# In the lists of words, @devices stands for the devices that have a run folder, @files for files and folders.
_BY_METAVAR = {"NAME": "@devices", "FILE": "@files", "FOLDER": "@files", "PATH": "@files"}


def words(path: str, verb: Parser) -> list[str]:
    """Return what may follow a verb: its own verbs, options, values, and the settings that it takes."""
    found = [*(parts(verb) if path else VERBS)]
    for action in verb._actions:
        found += action.option_strings
        if not action.option_strings and action.dest != "new_name":
            found += value_of(action)
    found += verb.pairs
    if verb.takes_settings:
        live_only = path == "set"
        found += [f"{each.name}=" for each in config.SETTINGS if not (live_only and each.fixed)]
    return found


def value_of(action: argparse.Action) -> list[str]:
    """Return what an option's or an argument's value may be, as far as that is known."""
    if isinstance(action, argparse._SubParsersAction):
        return []
    if action.choices:
        return [str(choice) for choice in action.choices]
    if action.dest == "output" and action.metavar == "LIST":
        return [column.name for column in COLUMNS]
    found = _BY_METAVAR.get(str(action.metavar))
    return [found] if found else []


def tree() -> Iterator[tuple[str, Parser]]:
    """Yield each verb as it is written, such as 'debug block', with its parser; '' is for no verb yet."""
    yield "", parser()
    for name in VERBS:
        verb = verb_parser(name)
        yield name, verb
        for part, inner in parts(verb).items():
            yield f"{name} {part}", inner


def script(name: str) -> str:
    """Return the script for a shell."""
    shell = SHELLS[name]
    found = dict(tree())

    def one_of(texts: Iterable[str]) -> str:
        return shell.one_of.join(f'"{text}"' for text in texts)

    def case(texts: Iterable[str], words: list[str]) -> str:
        return shell.case.format(texts=one_of(texts), words=" ".join(words)) + "\n"

    verbs = "".join("        " + case([path], words(path, inner)) for path, inner in found.items())
    values = "".join(
        "    " + case((f"{path} {option}" for option in action.option_strings), value_of(action))
        for path, inner in found.items()
        for action in inner._actions
        if action.option_strings and action.nargs != 0
    )
    nested = one_of(path for path in found if " " in path)
    text = shell.script.replace("{offers}", _OFFERS)
    return text.replace("{values}", values).replace("{verbs}", verbs).replace("{nested}", nested)


def run(arguments: argparse.Namespace) -> int:
    """Print the script."""
    sys.stdout.write(script(arguments.shell))
    return 0


def add(commands: Commands) -> None:
    """Add the verb."""
    verb = commands.add_parser(
        "completion",
        description="Print a script that completes commands, options, devices and settings in the shell: "
        "'zramd completion bash >/etc/bash_completion.d/zramd', "
        "'zramd completion zsh >/usr/local/share/zsh/site-functions/_zramd', "
        "'zramd completion fish >/etc/fish/completions/zramd.fish', "
        "or for the present shell 'source <(zramd completion bash)'.",
    )
    verb.add_argument("shell", metavar="SHELL", choices=list(SHELLS), help=", ".join(SHELLS))
    verb.set_defaults(run=run)
