"""The sentence for a Python too old for the suite. Parsed by that Python: no annotations, no f-strings."""

import os
import sys

SUITE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def newer_pythons(oldest):
    """Paths of interpreters on PATH that are new enough, by their names alone."""
    found = []
    for minor in range(oldest[1], oldest[1] + 3):
        for folder in os.environ.get("PATH", "").split(os.pathsep):
            path = os.path.join(folder, "python3." + str(minor))
            if os.access(path, os.X_OK):
                found.append(path)
                break
    return found


def refusal(oldest):
    """One or two lines: what is wrong, and the command that goes on."""
    wanted = ".".join(str(part) for part in oldest)
    running = ".".join(str(part) for part in sys.version_info[:3])
    found = newer_pythons(oldest)
    lines = [
        "error: this suite needs Python " + wanted + " or newer; this is Python " + running + ", " + sys.executable
    ]
    if found:
        lines.append('try: "' + found[-1] + '" "' + os.path.join(SUITE, "commons", "doctor") + '"')
    else:
        lines.append("try: sudo apt-get install python3." + str(oldest[1]) + " python3." + str(oldest[1]) + "-venv")
    return "\n".join(lines)
