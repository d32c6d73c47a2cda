"""Why a store that knows a model's weights may lack its log-probs: something else that computes numbers has changed.

Each model's folder of a store holds ``profile.json``: what its log-probs were computed with. It is for people alone.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..durable import replace_file
from ..plain_json import to_json
from .keys import KEY_SCHEMA, ModelIdentity
from .shards import cannot_write
from .store import ReferenceStore

PROFILE_FILE = "profile.json"


def note_profile(store: ReferenceStore, identity: ModelIdentity) -> None:
    """Write what the model's log-probs are computed with beside them, unless it is there.

    Raises:
        UserError: the folder cannot be written.
    """
    path = store.folder(bytes.fromhex(identity.digest)) / PROFILE_FILE
    if path.exists():
        return
    record = {"schema": KEY_SCHEMA, "weights": identity.weights, "profile": identity.profile}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, (to_json(record, indent=1, sort_keys=True) + "\n").encode())
    except OSError as error:
        raise cannot_write(path.parent, error) from error


def why_absent(store: ReferenceStore, identity: ModelIdentity) -> str | None:
    """One line that names what the store has of the same weights and why it is not used; None when it has nothing."""
    if store.folder(bytes.fromhex(identity.digest)).exists():
        return None
    reasons = [_difference(path, identity) for path in sorted(store.path.glob(f"*/{PROFILE_FILE}"))]
    if store.folder(bytes.fromhex(identity.first_digest)).exists():
        reasons.append("an earlier version, whose keys did not name libraries and device")
    known = [reason for reason in reasons if reason]
    if not known:
        return None
    return f"{store.path} has log-probs of these weights from {' and from '.join(known)}: they are not used"


def _difference(path: Path, identity: ModelIdentity) -> str | None:
    """How other log-probs of the same weights were computed; None for other weights, or a file that is not readable."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["weights"] != identity.weights:
            return None
        then = dict(record["profile"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    names = sorted(then.keys() | identity.profile.keys())
    pairs = [(n, then.get(n, "as kept"), identity.profile.get(n, "as kept")) for n in names]
    return ", ".join(f"{n} {before} (now {now})" for n, before, now in pairs if before != now) or None
