"""A sample of what a server tells."""

from support.numbers import FakeDevice
from zramd.control.samples import Sample
from zramd.stats import snapshots, texts


def sample(**changes: object) -> Sample:
    """What a server with some zspages tells, with some numbers changed."""
    import json

    taken = snapshots.take(FakeDevice(), name="zram0", comp_algorithm="lz4", version="0", started=0)
    values = {**json.loads(texts.to_json(taken)), "uptime": 10.0, "pid": 7, **changes}
    classes = json.loads(texts.classes_json(snapshots.take_classes(FakeDevice())))
    return Sample(values, classes, 1, {}, {})
