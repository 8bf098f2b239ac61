"""The load that a seed stands for: publisher and oracle derive it independently of the platform."""

import json
import random
from dataclasses import dataclass

SITES = ("north", "south")
T0_US = 1_000_000  # spacing of readings in microseconds


@dataclass(frozen=True)
class Message:
    """One publish: `reading` is (site, device, seq, values), or None for garbage."""

    topic: str
    payload: bytes
    reading: tuple | None
    duplicate: bool


@dataclass(frozen=True)
class Load:
    seed: int
    start_us: int
    devices: int = 1000
    readings: int = 100_000
    duplicates: float = 0.10
    garbage: float = 0.01

    def device(self, number):
        """Devices alternate between two sites that use equal device ids and equal seqs."""
        return SITES[number % 2], f"pump-{number // 2}"

    def messages(self, lane=0, lanes=1):
        """Yields the publishes of the devices of one lane, in order."""
        rng = random.Random(f"{self.seed}/{lane}/{lanes}")
        own = [n for n in range(self.devices) if n % lanes == lane]
        seqs = dict.fromkeys(own, 0)
        late = []
        total = self.readings * len(own) // self.devices
        for index in range(total):
            number = own[index % len(own)]
            site, device = self.device(number)
            seqs[number] += 1
            seq = seqs[number]
            values = {
                "temperature": rng.randrange(4000, 9600) / 64,
                "running": rng.random() < 0.5,
                "mode": rng.choice(("auto", "manual", "off")),
            }
            body = {"epoch": 1, "seq": seq, "ts": self.start_us + seq * T0_US, "values": values}
            payload = json.dumps(body).encode()
            topic = f"tl/{site}/{device}/telemetry"
            yield Message(topic, payload, (site, device, seq, values), False)
            if rng.random() < self.duplicates:
                late.append(Message(topic, payload, (site, device, seq, values), True))
            if rng.random() < self.garbage:
                yield Message(topic, b"garbage \x00\xff %d/%d/%d {" % (self.seed, lane, index), None, False)
            while late and rng.random() < 0.5:
                yield late.pop(0)
        yield from late

    def everything(self, lanes):
        for lane in range(lanes):
            yield from self.messages(lane, lanes)
