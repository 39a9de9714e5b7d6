"""How are secrets kept out of everything that is written?

A value is a secret by its key's name, by standing in a URL or behind `token=`, or by being the value of an environment
variable with such a name. What is written is masked; what runs is not.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

SECRET_WORDS = r"(?:token|password|passwd|passphrase|secret|credentials?|(?:api|access|private|auth)_?key)"
SECRET_KEY = re.compile(rf"(^|_){SECRET_WORDS}$", re.I)
SECRET_GIVEN = re.compile(rf"((?:\b|_){SECRET_WORDS}\s*[=:]\s*['\"]?)(?!\$\{{)[^\s,'\"}}]+", re.I)
SECRET_SAID = re.compile(SECRET_GIVEN.pattern.replace("[=:]", "="), re.I)  # "token: no such key" is none
SECRET_URL = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
MASK = "***"
NO_SECRETS = ("_target_", "run_dir")  # of our packages; and the run's folder, which bears its name anyway


def mask(tree: Any, name: str = "") -> Any:
    """Replace secrets by ***: values of keys that look like one, passwords in URLs, values of secret variables.

    A text, such as a command line or a whole file, is searched for all of these.
    """
    if isinstance(tree, dict):
        return {key: mask(value, str(key)) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [mask(item, name) for item in tree]
    if isinstance(tree, int | float) and not isinstance(tree, bool) and SECRET_KEY.search(name):
        return MASK
    if not isinstance(tree, str):
        return tree
    if name in NO_SECRETS:
        return tree
    if SECRET_KEY.search(name) and tree:
        return MASK
    return _masked(tree, SECRET_GIVEN)


def mask_said(text: str) -> str:
    """Replace secrets in what is said to the user: as `mask` does, but for what stands behind a colon."""
    return _masked(text, SECRET_SAID)


def _masked(text: str, given: re.Pattern[str]) -> str:
    for variable, secret in os.environ.items():
        if len(secret) >= 8 and SECRET_KEY.search(variable):
            # a word, as a development server's password may be, is one only where it stands alone
            found = rf"(?<![^\W_]){secret}(?![^\W_])" if secret.isalpha() else re.escape(secret)
            text = re.sub(found, MASK, text)
    return given.sub(rf"\1{MASK}", SECRET_URL.sub(MASK, text))


def masked_in(tree: Any, key: str = "") -> Iterator[str]:
    """Walk to the keys (`section.name`) of a written config whose values were masked."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from masked_in(value, f"{key}.{name}".lstrip("."))
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from masked_in(value, key)
    elif isinstance(tree, str) and MASK in tree:
        yield key


def mask_log(record: logging.LogRecord) -> bool:
    """Mask what a record says, its traceback too: a filter for handlers, which lets all through."""
    record.msg, record.args = mask_said(record.getMessage()), ()
    if record.exc_info and not record.exc_text:
        record.exc_text = mask_said(logging.Formatter().formatException(record.exc_info))
    return True


def mask_what_hydra_wrote() -> None:
    """Take secrets that stood on the command line out of the job's `.hydra` folder."""
    from hydra.core.hydra_config import HydraConfig  # a loader's worker masks too, and needs none of it

    job = HydraConfig.get()
    for path in Path(job.runtime.output_dir, job.output_subdir or "").glob("*.yaml") if job.output_subdir else ():
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError:  # another rank is just writing it, and masks it afterwards
            continue
        if (masked := mask(tree)) != tree:  # not the text: a bare *** is no YAML
            part = path.with_suffix(f".part-{os.getpid()}")
            part.write_text(yaml.safe_dump(masked, sort_keys=False), encoding="utf-8")
            part.replace(path)
