#!/usr/bin/env python3
"""Writes records that no stage can read straight into Kafka, as a foreign program with a defect would.

Each record that Kafka acknowledged is a line `topic value-in-hexadecimal` of its journal.
"""

import argparse
import json
import os
import random
import struct
import sys
import time
import urllib.request

from confluent_kafka import Producer

READINGS, CHECKED = "device.telemetry.v1", "data_core.reading.v1"
# A burst fills one partition with nothing else.
BURST = 1_000


def schema_id(registry, topic):
    with urllib.request.urlopen(f"{registry}/subjects/{topic}-value/versions/latest", timeout=20) as answer:
        return json.load(answer)["id"]


def values(rng, known, foreign):
    """Yields (topic, value) for ever: noise, a known schema with noise behind it, the schema of another
    topic, a schema that nobody registered."""
    number = 0
    while True:
        number += 1
        mark = b"poison %d" % number
        kind = rng.randrange(20)
        if kind == 0:
            value = b"\x00" + struct.pack(">I", 900_000 + rng.randrange(3)) + mark
        elif kind < 7:
            value = b"\x00" + struct.pack(">I", known) + b"\xff" * 12 + mark
        elif kind < 10:
            value = b"\x00" + struct.pack(">I", foreign) + b"\xff" * 12 + mark
        else:
            value = b"\x07" + rng.randbytes(rng.randrange(40)) + mark
        yield (CHECKED if rng.random() < 0.1 else READINGS), value


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kafka", required=True)
    parser.add_argument("--registry", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True, help="records a second outside the burst")
    parser.add_argument("--deadline", type=float, required=True)
    parser.add_argument("--journal", required=True, help="file of what was acknowledged")
    args = parser.parse_args()
    deadline = time.monotonic() + args.deadline
    rng = random.Random(args.seed)
    producer = Producer({
        "bootstrap.servers": args.kafka, "enable.idempotence": True, "acks": "all",
        # An outage must not make a record's fate unknown: it is tried until the deadline.
        "message.timeout.ms": int(args.deadline * 1000)})
    journal = open(args.journal, "a", buffering=1)
    failed = []

    def delivered(error, message):
        if error is not None:
            failed.append(str(error))
            return
        print(message.topic(), message.value().hex(), file=journal)

    source = values(rng, schema_id(args.registry, READINGS), schema_id(args.registry, "service_platform.alert.v1"))
    for index in range(args.count):
        topic, value = next(source)
        in_burst = args.count // 2 <= index < args.count // 2 + BURST
        if in_burst:
            producer.produce(READINGS, value, key=b"poison", partition=args.seed % 6, on_delivery=delivered)
        else:
            producer.produce(topic, value, key=b"poison/%d" % index, on_delivery=delivered)
            time.sleep(1 / args.rate)
        producer.poll(0)
        if time.monotonic() > deadline:
            break
    left = producer.flush(max(1.0, deadline - time.monotonic()))
    journal.flush()
    os.fsync(journal.fileno())
    if left or failed:
        sys.exit(f"{left} records without an answer, {len(failed)} failed: {failed[:3]}")


if __name__ == "__main__":
    main()
