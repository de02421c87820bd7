"""Bundles that a wrong hand made: each file of a small bundle harmed, and sealed anew as its writer would.

``python -m tests.support.foreign_bundles FOLDER COUNT SEED`` makes one, harms it COUNT times and loads each. It ends with an
error at the first that neither loads and predicts nor is refused by name, that takes longer than a few seconds or more memory
than its files allow.
"""

from __future__ import annotations

import faulthandler
import json
import random
import resource
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xgboost

from bp_spark.core.config import FusionConfig
from bp_spark.core.errors import BpSparkError
from bp_spark.model.curve import Curve
from bp_spark.model.explanation import Explanation, Imitation
from bp_spark.model.horizons import EXPECTED, Horizons, Ratio
from bp_spark.model.level import Level
from bp_spark.model.members.base import predict_all
from bp_spark.model.members.btyd import FEATURES, BtydMember
from bp_spark.model.members.linear import LinearMember
from bp_spark.model.members.transformer import TransformerMember
from bp_spark.model.members.trees import SqrtTreesMember, TreesMember
from bp_spark.model.stack import CalibratedStack
from bp_spark.registry import bundle as bundles
from bp_spark.registry.manifest import describe_file, encode, seal

SECONDS, MEGABYTES = 20, 1024
VALUES: tuple[Any, ...] = (
    *(0, 1, -1, 2, -7, 10**6, 2**31, 2**63, -(2**63), 10**12, 10**400, 10**4000),
    *(0.5, -0.5, 1e300, -1e300, 1e-300, float("nan"), float("inf"), float("-inf")),
    *("", "x", "1", "1e400", "nan", "[1E0]", "\x00", "\ud800", "../../x", "c" * 10_000),
    *(True, None, [], {}, [0], [[0]], {"x": 1}, [1e300] * 3, ["x", "x"]),
)


def write(folder: Path) -> Path:
    """Write a bundle that has every kind of member, with an explanation, a level and other horizons."""
    from tests.support.networks import make_network
    from tests.support.training_rows import SPEC

    columns = users()
    features, label = SPEC.tabular, columns["label_spend"]
    values = np.stack([columns[name] for name in features], axis=1)
    matrix = xgboost.DMatrix(values, label=label, feature_names=list(features))
    by_log = xgboost.train({"objective": "reg:tweedie", "max_depth": 2, "seed": 1}, matrix, 3)
    by_root = xgboost.train({"objective": "reg:squarederror", "max_depth": 2, "seed": 1}, matrix, 3)
    by_root.set_attr(smearing="1.5")
    imitation = xgboost.train({"objective": "reg:squarederror", "max_depth": 2, "seed": 2}, matrix, 3)
    members = [
        TreesMember(by_log),
        SqrtTreesMember(by_root),
        LinearMember(features[:2], (2.0, 3.0), (-0.1, 0.1), 0.2, 1.3, 9.0),
        BtydMember(90, 0.5, 30.0, 0.8, 2.0, 2.0, 3.0, 20.0),
        TransformerMember(make_network(others=(30,))),
    ]
    predictions = predict_all(members, columns)
    names = tuple(member.name for member in members)
    frame = pd.DataFrame({"label_spend": label, **{name: predictions[name] for name in names}})
    frame["btyd_active"], frame["btyd_silent_days"] = predictions["btyd_active"], predictions["btyd_silent_days"]
    stack = CalibratedStack.fit(frame, FusionConfig(members=names))
    level = Level("2017-10-03", 0.5, 0.4, Curve((-7.0, 0.0, 7.0), (0.1, 0.2, 0.3)), 0.05)
    stack = CalibratedStack(**{**vars(stack), "level": level})
    horizons = Horizons(
        90, (Ratio(30, "transformer", Curve((0.1, 0.9), (0.3, 0.4))), Ratio(180, EXPECTED, Curve((2.0,), (1.9,))))
    )
    imitations = {name: Imitation.of(name)(imitation) for name in ("linear", "btyd", "transformer")}
    reads_history = dict(zip(stack.members, stack.weights, strict=True))["transformer"] > 0
    explanation = Explanation(
        features, ("one",) * len(features), imitations, dict.fromkeys(imitations, 0.9), reads_history
    )
    inputs = {"tabular": list(dict.fromkeys([*features, *FEATURES])), "history": list(SPEC.columns[len(features) :])}
    lineage = {"test_date": "2017-10-03", "currency": "USD", "judged": {"bundle": "one", "test_date": "2017-10-03"}}
    bundles.write(folder, members, stack, horizons, inputs=inputs, lineage=lineage, metrics={}, explanation=explanation)
    return folder


def users(count: int = 300) -> dict[str, Any]:
    """Columns of made-up users."""
    from tests.support.training_rows import make_rows

    rng = np.random.default_rng(0)
    visits = {name: rng.integers(1, 50, count).astype(np.float64) for name in FEATURES}
    return make_rows(count) | visits


def paths(document: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to each value of a document; of a list, to its first, second and last."""
    if at:
        yield at
    if isinstance(document, dict):
        for key, value in document.items():
            yield from paths(value, (*at, key))
    elif isinstance(document, list):
        for position in sorted({0, 1, len(document) - 1} & set(range(len(document)))):
            yield from paths(document[position], (*at, position))


def harm_json(text: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Return a JSON document with one value replaced, removed, doubled or nested; and what was done."""
    document = json.loads(text)
    *way, last = rng.choice(list(paths(document)))
    parent = document
    for step in way:
        parent = parent[step]
    kind = rng.choice(("replace", "replace", "replace", "remove", "double", "shift", "nest"))
    where = f"{kind} {[*way, last]}"
    if kind == "remove":
        del parent[last]
    elif kind == "double" and isinstance(parent[last], list):
        parent[last] = parent[last] * rng.choice((2, 1000))
    elif kind == "shift" and isinstance(parent[last], list) and parent[last]:
        parent[last] = parent[last][1:] + parent[last][:1]
    elif kind == "nest":
        deep: Any = parent[last]
        for _ in range(rng.choice((3, 400))):
            deep = [deep] if rng.random() < 0.5 else {"x": deep}
        parent[last] = deep
    else:
        parent[last] = rng.choice(VALUES)
        where += f" by {type(parent[last])!s}"
    # json.dumps refuses whole numbers of more than 4,300 digits and deep nests; both are tried as texts.
    return json.dumps(document).encode(), where


def harm_bytes(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Return a file with some bytes changed, most of them in its header, or cut short; and what was done."""
    harmed = bytearray(content)
    if rng.random() < 0.2:
        return bytes(harmed[: rng.randrange(len(harmed))]), "cut"
    places = [rng.randrange(min(len(harmed), rng.choice((8, 2000, len(harmed))))) for _ in range(rng.choice((1, 4)))]
    for place in places:
        harmed[place] = rng.choice((0, 255, 127, 48, 57, rng.randrange(256)))
    return bytes(harmed), f"bytes {places}"


def harm(folder: Path, rng: random.Random) -> str:
    """Harm a bundle in one place and seal it anew; return what was done."""
    manifest = folder / "manifest.json"
    content = {key: value for key, value in json.loads(manifest.read_text()).items() if key not in _SEALS}
    name = rng.choice([*content["files"], "manifest.json", "manifest.json"])
    path = folder / name
    is_json = name.endswith(".json") and rng.random() < 0.9
    if name != "manifest.json":
        harmed, what = (harm_json if is_json else harm_bytes)(path.read_bytes(), rng)
        path.write_bytes(harmed)
        content["files"][name] = describe_file(path)
    else:
        harmed, what = harm_json(json.dumps(content).encode(), rng)
        content = json.loads(harmed)
    manifest.write_bytes(encode(seal(content)))
    return f"{name}: {what}"


_SEALS = ("digest", "checksum")


def main(folder: Path, count: int, seed: int) -> None:
    """Harm a bundle ``count`` times; see the module."""
    faulthandler.enable()
    warnings.simplefilter("ignore")
    pristine = write(folder / "pristine")
    columns = users(20)
    bundle = bundles.load(pristine)
    bundle.explain(columns, bundle.predict(columns))
    # The libraries are loaded by now; what comes is the bundle's.
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEGABYTES * 2**20, resource.RLIM_INFINITY))
    usable = 0
    for number in range(count):
        rng = random.Random(f"{seed}-{number}")
        copy = Path(shutil.copytree(pristine, folder / "copy", dirs_exist_ok=True))
        what = harm(copy, rng)
        print(f"{number}: {what}", flush=True)
        signal.alarm(SECONDS)
        try:
            bundle = bundles.load(copy)
            predicted = bundle.predict(columns)
            bundle.explain(columns, predicted)
            usable += 1
        except BpSparkError as error:
            # shown for whoever looks at a failure
            print(f"  {type(error).__name__}: {str(error)[:200]}", flush=True)
        signal.alarm(0)
    print(f"usable {usable} of {count}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
