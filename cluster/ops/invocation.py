"""The text of one of our commands that works for its reader: with the python that runs this one."""

import os
import shlex
import shutil
import sys
from pathlib import Path


def command(arguments: str) -> str:
    """`python -m cluster ARGUMENTS`, to be shown to a person or pasted."""
    return f"{_python()} -m cluster {arguments}"


def _python() -> str:
    """`python` if that is this interpreter (an environment is active), else its path, relative if it is below the
    current directory.
    """
    ours = Path(os.path.abspath(sys.executable))
    if not sys.executable or shutil.which("python") == str(ours):
        return "python"
    here = Path.cwd()
    return shlex.quote(str(ours.relative_to(here) if ours.is_relative_to(here) else ours))
