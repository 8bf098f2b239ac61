"""The load that a seed stands for: publisher and oracle derive it independently of the platform."""

import json
import random
from dataclasses import dataclass, field, replace

SITES = ("north", "south")
T0_US = 1_000_000  # spacing of readings in microseconds
HOUR_US = 3_600 * 1_000_000

# What is odd about a device, by its number modulo 20, where a load is mixed.
KINDS = {1: "behind", 4: "ahead", 7: "restarts", 10: "renews", 13: "reorders"}
# Readings of one life of a device that restarts.
LIFE = 30


@dataclass(frozen=True)
class Reading:
    """One reading of a device; two of them are never equal in `identity`."""

    site: str
    device: str
    epoch: int
    # Counts the lives under one epoch: how a device restarted is nothing that it says.
    generation: int
    seq: int
    ts_us: int
    values: dict = field(compare=False)
    # Sent after a newer one of its device.
    late: bool = False
    # Its clock lies so far behind that no rule looks at it.
    stale: bool = False

    @property
    def identity(self):
        return self.site, self.device, self.epoch, self.seq, self.ts_us

    @property
    def position(self):
        return self.epoch, self.generation, self.seq


@dataclass(frozen=True)
class Message:
    """One publish: `reading` is absent for garbage."""

    topic: str
    payload: bytes
    reading: Reading | None
    duplicate: bool


class Device:
    """Where one device stands in its load."""

    def __init__(self, kind):
        self.kind = kind
        self.count, self.epoch, self.generation, self.seq = 0, 1, 0, 0
        # The reading that is overtaken by the next one.
        self.held = None

    def advance(self):
        begins = self.count > 0 and self.count % LIFE == 0
        if begins and self.kind == "restarts":
            self.generation, self.seq = self.generation + 1, 0
        if begins and self.kind == "renews":
            self.epoch, self.seq = self.epoch + 1, 0
        self.count += 1
        self.seq += 1

    def skew_us(self):
        # Within what is accepted: 30 days behind and one hour ahead of the arrival.
        return {"behind": -HOUR_US, "ahead": HOUR_US * 5 // 6}.get(self.kind, 0)


@dataclass(frozen=True)
class Load:
    seed: int
    start_us: int
    devices: int = 1000
    readings: int = 100_000
    duplicates: float = 0.20
    garbage: float = 0.01
    # Whether some devices have wrong clocks, restart under an old epoch or a new one, or send out of order.
    mix: bool = False

    def device(self, number):
        """Devices alternate between two sites that use equal device ids and equal seqs."""
        return SITES[number % 2], f"pump-{number // 2}"

    def kind(self, number):
        return KINDS.get(number % 20, "plain") if self.mix else "plain"

    def messages(self, lane=0, lanes=1):
        """Yields the publishes of the devices of one lane, in order."""
        rng = random.Random(f"{self.seed}/{lane}/{lanes}")
        own = [n for n in range(self.devices) if n % lanes == lane]
        devices = {n: Device(self.kind(n)) for n in own}
        repeats = []
        total = self.readings * len(own) // self.devices
        for index in range(total):
            number = own[index % len(own)]
            device = devices[number]
            device.advance()
            for message in self.in_order(rng, device, self.reading(rng, number, device)):
                yield message
                if rng.random() < self.duplicates:
                    repeats.append(replace(message, duplicate=True))
            if rng.random() < self.garbage:
                topic = message_topic(*self.device(number))
                yield Message(topic, b"garbage \x00\xff %d/%d/%d {" % (self.seed, lane, index), None, False)
            while repeats and rng.random() < 0.5:
                yield repeats.pop(0)
        yield from (device.held for device in devices.values() if device.held)
        yield from repeats

    def reading(self, rng, number, device):
        values = {
            "temperature": rng.randrange(4000, 9600) / 64,
            "running": rng.random() < 0.5,
            "mode": rng.choice(("auto", "manual", "off")),
        }
        site, name = self.device(number)
        ts_us = self.start_us + device.count * T0_US + device.skew_us()
        stale = device.kind == "behind"
        return Reading(site, name, device.epoch, device.generation, device.seq, ts_us, values, stale=stale)

    def in_order(self, rng, device, reading):
        """Yields what is sent when a reading is made: of a device that reorders none or two now and then."""
        body = {"epoch": reading.epoch, "seq": reading.seq, "ts": reading.ts_us, "values": reading.values}
        topic = message_topic(reading.site, reading.device)
        message = Message(topic, json.dumps(body).encode(), reading, False)
        held, device.held = device.held, None
        if device.kind == "reorders" and held is None and rng.random() < 0.2:
            device.held = message
            return
        yield message
        if held is not None:
            yield replace(held, reading=replace(held.reading, late=True))

    def everything(self, lanes):
        for lane in range(lanes):
            yield from self.messages(lane, lanes)


def message_topic(site, device):
    return f"tl/{site}/{device}/telemetry"
