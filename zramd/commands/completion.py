"""`zramd completion`: a script for the shell that completes verbs, options, devices and settings.

It is made from the parser, so it knows each verb that there is. What changes, the names of running devices,
the script looks up itself: starting Python for each press of the tab key would be felt.
"""

import argparse
import sys

TYPE_CHECKING = False  # what typing says too, without the time that it takes to import
if TYPE_CHECKING:
    from collections.abc import Iterator

    from zramd.commands import Commands, Parser

_BASH = """\
# bash completion for zramd, made by 'zramd completion bash'
_zramd() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD - 1]}}
    local verb= words= folder path file
    [[ $word == = || $previous == = ]] && return
    ((COMP_CWORD > 1)) && verb=${{COMP_WORDS[1]}}
    if ((COMP_CWORD > 2)); then
        case "$verb ${{COMP_WORDS[2]}}" in
        {nested}) verb+=" ${{COMP_WORDS[2]}}" ;;
        esac
    fi
    case "$verb $previous" in
{values}    *)
        case $verb in
{verbs}        esac
        ;;
    esac
    if [[ $words == *@devices* ]]; then
        words=${{words/@devices/}}
        folder=/run/zramd
        ((EUID)) && folder=${{XDG_RUNTIME_DIR:-/nonexistent}}/zramd
        for file in "$folder"/*/pid; do
            path=${{file%/pid}}
            [[ -e $file ]] && words+=" ${{path##*/}}"
        done
    fi
    mapfile -t COMPREPLY < <(
        compgen -W "${{words/@files/}}" -- "$word"
        [[ $words != *@files* ]] || compgen -f -- "$word"
    )
    [[ ${{COMPREPLY[0]-}} == *= ]] && compopt -o nospace
}}
complete -F _zramd zramd
"""
# In the lists of words, @devices stands for the devices that have a run folder, @files for files and folders.
_BY_METAVAR = {"NAME": "@devices", "FILE": "@files", "FOLDER": "@files"}


def words(parser: "Parser") -> list[str]:
    """Return what may follow a verb: its own verbs, options, values, and the settings that it takes."""
    from zramd import config
    from zramd.commands import verbs

    found = list(verbs(parser))
    for action in parser._actions:
        found += action.option_strings
        if not action.option_strings and action.dest != "new_name":
            found += value_of(action)
    if parser.takes_settings:
        live_only = parser.prog.endswith(" set")
        found += [f"{each.name}=" for each in config.SETTINGS if not (live_only and each.fixed)]
    return found


def value_of(action: argparse.Action) -> list[str]:
    """Return what an option's or an argument's value may be, as far as that is known."""
    from zramd.commands.listing import COLUMNS

    if isinstance(action, argparse._SubParsersAction):
        return []
    if action.choices:
        return [str(choice) for choice in action.choices]
    if action.dest == "output" and action.metavar == "LIST":
        return [column.name for column in COLUMNS]
    found = _BY_METAVAR.get(str(action.metavar))
    return [found] if found else []


def tree(parser: "Parser", path: str = "") -> "Iterator[tuple[str, Parser]]":
    """Yield each verb as it is written, such as 'debug block', with its parser; '' is the whole."""
    from zramd.commands import verbs

    yield path, parser
    for name, inner in verbs(parser).items():
        yield from tree(inner, f"{path} {name}".strip())


def bash() -> str:
    """Return the script for bash."""
    from zramd.commands import parser

    found = dict(tree(parser()))
    verbs = "".join(
        f'        "{path}") words="{" ".join(words(inner))}" ;;\n' for path, inner in found.items()
    )
    values = "".join(
        f"    {' | '.join(f'{path} {option}'.join(chr(34) * 2) for option in action.option_strings)})"
        f' words="{" ".join(value_of(action))}" ;;\n'
        for path, inner in found.items()
        for action in inner._actions
        if action.option_strings and action.nargs != 0
    )
    nested = " | ".join(f'"{path}"' for path in found if " " in path)
    return _BASH.format(verbs=verbs, nested=nested, values=values)


def run(arguments: argparse.Namespace) -> int:
    """Print the script."""
    sys.stdout.write(bash())
    return 0


def add(commands: "Commands") -> None:
    """Add the verb."""
    parser = commands.add_parser(
        "completion",
        help="print a script that completes what you type in the shell",
        description="Print a script that completes commands, options, devices and settings in the shell: "
        "'zramd completion bash >/etc/bash_completion.d/zramd', or 'source <(zramd completion bash)'.",
    )
    parser.add_argument("shell", metavar="SHELL", choices=["bash"], help="bash")
    parser.set_defaults(run=run)
