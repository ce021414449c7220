"""`finished.json`, which a run writes last: the round it ended with and the digests of its results.

Until then the result may be incomplete, for example an adapter without the base_delta that belongs to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fed.config import RunConfig
from fed.errors import FedError
from fed.files import digest_of, sync, sync_tree
from fed.sealed import read_sealed, write_sealed
from fed.simulation.rows import ROUNDS, RowSeal, sealed_lines
from fed.simulation.settings import changed_setting, fixed_settings
from fed.simulation.similarity import similarity_files

FINISHED = "finished.json"
ADAPTER, BASE_DELTA, CENTRALISED = "adapter", "base_delta.safetensors", "centralised.json"
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError)


def mark(directory: Path, config: RunConfig, number: int, seal: RowSeal, inputs: Mapping[str, str]) -> None:
    """Write that the run ended with round `number`, after everything that belongs to its result is on the disk."""
    sync_tree(directory / ADAPTER)
    sync([directory])
    facts = {"round": number, "rows": seal, "settings": fixed_settings(config), "inputs": dict(inputs)}
    write_sealed(directory / FINISHED, {**facts, "files": _digests(directory)})


def unmark(directory: Path) -> None:
    """Remove the mark of an earlier end, before results are replaced."""
    (directory / FINISHED).unlink(missing_ok=True)
    sync([directory])


def mark_centralised(directory: Path) -> None:
    """Add the results of centralised LoRA, written after the end of the rounds, to a finished run's digests."""
    facts = read_sealed(directory / FINISHED)
    facts["files"] = {**facts["files"], CENTRALISED: digest_of(directory / CENTRALISED)}
    write_sealed(directory / FINISHED, facts)


def why_not_finished(directory: Path, config: RunConfig) -> str | None:
    """Return why a run is not finished, or its result is not as it was then; None if all of it is."""
    path = directory / FINISHED
    if not path.is_file():
        return f"there is no {FINISHED}, so it has not ended"
    try:
        facts = read_sealed(path)
        if facts["round"] != config.rounds:
            return f"it has ended with round {facts['round']} of {config.rounds}"
        if (changed := changed_setting(facts["settings"], fixed_settings(config))) is not None:
            return f"it has ended with {changed}"
        seal = RowSeal(*facts["rows"])
        if seal.size_bytes != (directory / ROUNDS).stat().st_size:
            return f"{str(directory / ROUNDS)!r} is not as it was when the run ended"
        sealed_lines(directory, seal)
        return _changed_file(directory, facts["files"])
    except FedError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename or directory}: {error.strerror}"
    except _MALFORMED:
        return f"{str(path)!r} is not what a run writes"


def check_centralised(directory: Path) -> None:
    """Raise FedError if the results of centralised LoRA are not those that a finished run wrote."""
    known = _facts(directory).get("files", {}).get(CENTRALISED)
    if known is not None and digest_of(directory / CENTRALISED) != known:
        raise FedError(
            f"{str(directory / CENTRALISED)!r} is damaged; delete it, and python -m fed resume {directory} trains "
            "centralised LoRA anew"
        )


def settings_of_end(directory: Path) -> dict[str, Any]:
    """Return the settings of a finished run; nothing if it is not finished."""
    return dict(_facts(directory).get("settings", {}))


def row_seal(directory: Path) -> RowSeal | None:
    """Return the seal of the rows of a run that has ended, perhaps to be continued since; None if it has not."""
    seal = _facts(directory).get("rows")
    return None if seal is None else RowSeal(*seal)


def input_digests_of(directory: Path) -> dict[str, str]:
    """Return the digests of the inputs of a finished run; nothing if it is not finished."""
    return dict(_facts(directory).get("inputs", {}))


def _facts(directory: Path) -> dict[str, Any]:
    return read_sealed(directory / FINISHED) if (directory / FINISHED).is_file() else {}


def _changed_file(directory: Path, known: Mapping[str, str]) -> str | None:
    """Return which file of a result is not as it was, or None; results of centralised LoRA are not looked at."""
    now = _digests(directory)
    for name, value in known.items():
        if name != CENTRALISED and now.get(name) != value:
            return f"{str(directory / name)!r} is {'damaged' if name in now else 'missing'}"
    if (directory / BASE_DELTA).exists() and BASE_DELTA not in known:
        return f"{str(directory / BASE_DELTA)!r} does not belong to it"
    return None


def _digests(directory: Path) -> dict[str, str]:
    """Return the digests of the files of a result, by their names in the run's directory."""
    saved = (directory / ADAPTER).iterdir() if (directory / ADAPTER).is_dir() else ()
    paths = [directory / BASE_DELTA, *saved, *similarity_files(directory)]
    return {str(path.relative_to(directory)): digest_of(path) for path in sorted(paths) if path.is_file()}
