#!/usr/bin/env python3
"""Compares what was sent with what Kafka and the store hold. Shares no code with the platform.

Waits until the readings have arrived or the deadline passes, then checks, and prints every difference.
Exit code 0: everything agrees; 1: it does not.
"""

import argparse
import json
import sqlite3
import subprocess
import sys
import time
from collections import Counter

from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, TopicPartition
from confluent_kafka.admin import AdminClient

from journal import lane_path, read
from plan import Load

READINGS, CHECKED = "device.telemetry.v1", "data_core.reading.v1"
REPLAYED, REPLAY = "device.telemetry.v1.bridge_data-dlt", "device.telemetry.v1.bridge_data-replay"
ALERTS, ASIDE = "service_platform.alert.v1", "service_platform.alert.v1.notify-retry"
OUTCOMES = ("emitted", "filtered", "ignored", "duplicate", "expired", "dead_lettered")


class Store:
    """Rows of the warehouse as tuples, from SQLite or PostgreSQL."""

    def __init__(self, url):
        self.url = url

    def query(self, sql):
        if self.url.startswith("sqlite:"):
            path = self.url.removeprefix("sqlite:").removeprefix("//")
            with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10) as db:
                return [tuple(str(v) if v is not None else "" for v in row) for row in db.execute(sql)]
        out = subprocess.run(
            ["psql", "--no-psqlrc", "--tuples-only", "--no-align", "--field-separator=\x1f", self.url, "-c", sql],
            check=True, capture_output=True, text=True, timeout=120,
        ).stdout
        return [tuple(line.split("\x1f")) for line in out.splitlines() if line]


    def readings(self, sites):
        """Rows of the readings, the time in microseconds since 1970."""
        columns = "site_id, device_id, epoch, seq, name, number, text, flag"
        if self.url.startswith("sqlite:"):
            return self.query(f"SELECT {columns}, occurred_at FROM reading_data WHERE site_id IN {sites}")
        time_us = "(extract(epoch FROM occurred_at) * 1000000)::bigint"
        return self.query(f"SELECT {columns}, {time_us} FROM reading WHERE site_id IN {sites}")


class Kafka:
    def __init__(self, bootstrap):
        self.bootstrap = bootstrap
        self.admin = AdminClient({"bootstrap.servers": bootstrap})
        self.consumer = Consumer(
            {"bootstrap.servers": bootstrap, "group.id": "oracle", "enable.auto.commit": False,
             "isolation.level": "read_committed", "enable.partition.eof": True})

    def topics(self):
        return sorted(self.admin.list_topics(timeout=20).topics)

    def length(self, topic):
        """Returns how many records a topic was given that is written without transactions."""
        ends = [self.consumer.get_watermark_offsets(TopicPartition(topic, p), timeout=20)[1] for p in self.partitions(topic)]
        return sum(ends)

    def partitions(self, topic):
        return sorted(self.admin.list_topics(topic, timeout=20).topics[topic].partitions)

    def read(self, topic):
        """Every committed record of a topic as (key, value, headers)."""
        records, open_parts = [], set()
        assignment = []
        for p in self.partitions(topic):
            low, high = self.consumer.get_watermark_offsets(TopicPartition(topic, p), timeout=20)
            if high > low:
                assignment.append(TopicPartition(topic, p, low))
                open_parts.add(p)
        if not assignment:
            return records
        self.consumer.assign(assignment)
        deadline = time.monotonic() + 120
        while open_parts and time.monotonic() < deadline:
            for message in self.consumer.consume(5000, timeout=1):
                if message.error():
                    open_parts.discard(message.partition())
                else:
                    records.append((message.key(), message.value(), dict(message.headers() or [])))
        self.consumer.unassign()
        if open_parts:
            raise RuntimeError(f"{topic}: partitions {sorted(open_parts)} were not read to their end")
        return records

    def books(self, group):
        """Sums of the outcome counters in the group's commit metadata, by topic.

        The client hands metadata over without its length, so that what follows it in memory may be no text:
        then it is asked for again, by a new client whose memory lies elsewhere.
        """
        for _attempt in range(200):
            try:
                return self.books_as_read(group)
            except UnicodeDecodeError:
                time.sleep(0.1)
                self.admin = AdminClient({"bootstrap.servers": self.bootstrap})
        raise RuntimeError(f"the commit metadata of {group} could not be read as text")

    def books_as_read(self, group):
        future = self.admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group)])[group]
        sums = {}
        for tp in future.result(timeout=20).topic_partitions:
            if not tp.metadata:
                continue
            counts = sums.setdefault(tp.topic, Counter())
            # The client hands metadata over without its length: read one document, whatever follows it.
            books, _end = json.JSONDecoder().raw_decode(tp.metadata)
            for outcome, n in zip(OUTCOMES, books["n"]):
                counts[outcome] += n
        return sums


def expected_alerts(sent, threshold):
    """Raises and clears by (site, device) for `temperature > threshold`: each reading once, in order, and none
    that came after a newer one or with a time of long ago."""
    raised, raises, clears = set(), Counter(), Counter()
    for message in sent:
        reading = message.reading
        if reading is None or message.duplicate or reading.late or reading.stale:
            continue
        key = (reading.site, reading.device)
        if reading.values["temperature"] > threshold and key not in raised:
            raised.add(key)
            raises[key] += 1
        elif reading.values["temperature"] <= threshold and key in raised:
            raised.discard(key)
            clears[key] += 1
    return raises, clears


def acknowledged(load, lanes, journal):
    """Returns the messages that were acknowledged, in order by lane, and how many sent ones were not."""
    if journal is None:
        return list(load.everything(lanes)), 0
    messages, missing = [], 0
    for lane in range(lanes):
        _intended, numbers = read(lane_path(journal, lane))
        for number, message in enumerate(load.messages(lane, lanes)):
            if number in numbers:
                messages.append(message)
            else:
                missing += 1
    return messages, missing


def poison_of(path):
    """Returns the values that a foreign writer put into each topic."""
    values = {}
    if path:
        with open(path) as file:
            for line in file:
                topic, value = line.split()
                values.setdefault(topic, Counter())[bytes.fromhex(value)] += 1
    return values


def told_alerts(path):
    """Returns what a webhook took, by the key under which repeats are recognised: the contents that came under it."""
    told = {}
    with open(path, "rb") as file:
        data = file.read()
    for line in data[:data.rfind(b"\n") + 1].decode().splitlines():
        key, state, site, device, alert = line.split(" ")
        told.setdefault(key, set()).add((state, site, device, alert))
    return told


def check_replays(check, kafka, poison, replays):
    """Holds letters that were replayed in vain, again and again, against what was replayed: each was sent once for
    each request that covered it, and became one letter."""

    def by_count(topic):
        found = Counter()
        for _key, value, headers in kafka.read(topic):
            found[value, int(headers.get("tl-replay-count", b"0"))] += 1
        return found

    letters, sent = by_count(REPLAYED), by_count(REPLAY)
    check.equal(f"letters in {REPLAYED} before any replay", Counter({v: n for (v, k), n in letters.items() if k == 0}), poison)
    check.equal(f"records in {REPLAY}", sum(sent.values()), replays)
    check.equal("letters of replays", Counter({key: n for key, n in letters.items() if key[1] > 0}), sent)
    doubled = [key for key, n in sent.items() if n > letters[key[0], key[1] - 1]]
    check.equal("letters that were replayed more than once", doubled[:5], [])
    counted = kafka.books("bridge_data").get(REPLAY, Counter())
    check.equal(f"bridge_data: outcomes on {REPLAY}", nonzero(counted), nonzero({"dead_lettered": replays}))


class Check:
    def __init__(self):
        self.failures = []

    def equal(self, what, found, expected):
        if isinstance(found, Counter) and found != expected:
            keys = [k for k in {**found, **expected} if found[k] != expected[k]]
            some = {k: (found[k], expected[k]) for k in keys[:5]}
            self.failures.append(
                f"{what}: found {sum(found.values())}, expected {sum(expected.values())}; {len(keys)} differ, "
                f"some of them as (found, expected): {some!r}")
        elif found != expected:
            self.failures.append(f"{what}: found {found!r}, expected {expected!r}")

    def true(self, what, condition):
        if not condition:
            self.failures.append(what)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kafka", required=True)
    parser.add_argument("--database", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--start-us", type=int, required=True)
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--readings", type=int, default=100_000)
    parser.add_argument("--lanes", type=int, default=4)
    parser.add_argument("--threshold", type=float, help="of the rule temperature > THRESHOLD that is in force")
    parser.add_argument("--rule", default="demo-overheat")
    parser.add_argument("--only-rule", action="store_true", help="no other rule is or was in force")
    parser.add_argument("--redelivery", action="store_true", help="faults were injected: repeats may occur on the wire")
    parser.add_argument("--deadline", type=float, default=120)
    parser.add_argument("--journal", help="directory of the publisher's journal: what it says is acknowledged must be there")
    parser.add_argument("--poison", help="journal of poison.py")
    parser.add_argument("--replays", type=int, help="replays of letters of bridge_data that were asked for and done")
    parser.add_argument("--webhook", help="journal of receive.py")
    parser.add_argument("--deleted", action="store_true", help="retention has deleted records from the topics of readings")
    parser.add_argument("--mix", action="store_true", help="as publish.py")
    args = parser.parse_args()
    load = Load(args.seed, args.start_us, args.devices, args.readings, mix=args.mix)
    store, kafka, check = Store(args.database), Kafka(args.kafka), Check()

    sent, missing = acknowledged(load, args.lanes, args.journal)
    check.equal("publishes that were not acknowledged", missing, 0)
    poison = poison_of(args.poison)
    poisoned = {topic: sum(values.values()) for topic, values in poison.items()}
    readings, garbage, repeats, last, late = {}, Counter(), 0, {}, 0
    for message in sent:
        reading = message.reading
        if reading is None:
            garbage[message.payload] += 1
        elif message.duplicate:
            repeats += 1
        else:
            readings[reading.identity] = reading.values
            late += reading.late
            device = (reading.site, reading.device)
            last[device] = max(last.get(device, (reading.position, {})), (reading.position, reading.values),
                               key=lambda entry: entry[0])
    sites = "('north', 'south')"
    wanted_rows = 3 * len(readings)

    raises, clears = expected_alerts(sent, args.threshold) if args.threshold is not None else ({}, {})

    def alerts():
        """Rows of alerts by device: all that were raised, and those that were cleared again."""
        rows = store.query(f"SELECT site_id, device_id, state FROM alert WHERE rule_id = '{args.rule}' AND site_id IN {sites}")
        return Counter((s, d) for s, d, _ in rows), Counter((s, d) for s, d, state in rows if state == "cleared")

    def settled():
        found = alerts()
        if sum(found[0].values()) < sum(raises.values()) or sum(found[1].values()) < sum(clears.values()):
            return False
        rows = int(store.query(f"SELECT count(*) FROM reading WHERE site_id IN {sites}")[0][0])
        twins = {(s, d): doc for s, d, doc in store.query(f"SELECT site_id, device_id, document FROM twin WHERE site_id IN {sites}")}
        stale = [k for k, (_position, values) in last.items() if k not in twins or reported(twins[k]) != values]
        return rows >= wanted_rows and not stale and has_letters() and has_told() and has_replayed()

    # Who reads what nobody can read.
    deciders = ("bridge_data", "evaluate_rules", "update_twin")
    readers = {READINGS: deciders, CHECKED: ("load_warehouse",)}

    def stored_books(topic):
        """Outcome counters of load_warehouse."""
        sums = Counter()
        for (books,) in store.query(
            f"SELECT books FROM stage_offset WHERE consumer_group = 'load_warehouse' AND topic = '{topic}'"
        ):
            sums.update(dict(zip(OUTCOMES, json.loads(books)["n"])))
        return sums

    def has_replayed():
        return sum(kafka.books("bridge_data").get(REPLAY, Counter()).values()) >= (args.replays or 0)

    def has_letters():
        counted = [kafka.books(group).get(READINGS, Counter())["dead_lettered"] for group in deciders]
        return (min(counted) >= poisoned.get(READINGS, 0)
                and stored_books(CHECKED)["dead_lettered"] >= poisoned.get(CHECKED, 0))

    def has_told():
        """Says whether every alert was told, and `notify` has counted what it did about it."""
        if not args.webhook:
            return True
        counted = {topic: sum(outcomes.values()) for topic, outcomes in kafka.books("notify").items()}
        wanted = sum(raises.values()) + sum(clears.values())
        return (len(told_alerts(args.webhook)) >= wanted and counted.get(ALERTS, 0) >= wanted
                and counted.get(ASIDE, 0) >= len(kafka.read(ASIDE)))

    deadline = time.monotonic() + args.deadline
    while not settled() and time.monotonic() < deadline:
        time.sleep(1)

    # The foreign writer's own client may write a record twice (librdkafka, where the first batch for a partition meets
    # a leader that is not ready): what counts is what lies in the topics, which is all of its journal.
    if poison and not args.deleted:
        for topic, values in poison.items():
            held = Counter(value for _k, value, _h in kafka.read(topic) if value in values)
            lost = [value for value, n in values.items() if held[value] < n]
            check.equal(f"records of the foreign writer missing from {topic}", lost[:5], [])
            poison[topic] = held
        poisoned = {topic: sum(values.values()) for topic, values in poison.items()}

    # The warehouse: each reading once, and with what was sent.
    found = Counter()
    wrong = 0
    for site, device, epoch, seq, name, number, text, flag, time_us in store.readings(sites):
        identity = (site, device, int(epoch or 0), int(seq or 0), int(time_us))
        found[*identity, name] += 1
        value = float(number) if number else text if text else flag in ("1", "t", "true", "True") if flag else None
        wrong += value != readings.get(identity, {}).get(name)
    check.equal("rows with values that were not sent", wrong, 0)
    check.equal("rows of the warehouse", sum(found.values()), wanted_rows)
    check.equal("rows that occur more than once", sum(1 for n in found.values() if n > 1), 0)
    gone = [r for r in readings if any((*r, name) not in found for name in ("temperature", "running", "mode"))]
    check.equal("readings missing from the warehouse", len(gone), 0)
    check.equal("some of the readings missing from the warehouse", gone[:5], [])

    # Dead letters: each garbage message, byte for byte.
    dead = Counter(value for _k, value, headers in kafka.read("device.telemetry.v1.bridge-dlt"))
    if args.redelivery:
        check.equal("garbage messages in the dead-letter topic", set(dead), set(garbage))
    else:
        check.equal("garbage messages in the dead-letter topic", dead, garbage)

    # Dead letters of stages: what nobody can read, byte for byte, and nothing else. A load stage may write one
    # twice: its letter is acknowledged before its offset moves.
    for topic, groups in readers.items():
        for group in groups:
            name = f"{topic}.{group}-dlt"
            found_letters = Counter(value for _k, value, _h in kafka.read(name))
            wanted = poison.get(topic, Counter())
            if args.replays is not None and name == REPLAYED:
                check_replays(check, kafka, wanted, args.replays)
            elif group == "load_warehouse":
                check.equal(f"letters in {name}", set(found_letters), set(wanted))
            else:
                check.equal(f"letters in {name}", found_letters, wanted)

    for name in kafka.topics():
        known = name in {f"{topic}.{group}-dlt" for topic, groups in readers.items() for group in groups}
        if name.endswith(("-dlt", "-parking", "-retry")) and not known and name not in (f"{READINGS}.bridge-dlt", ASIDE):
            check.equal(f"records in {name}", len(kafka.read(name)), 0)

    # Twins: the last reading of each device.
    twins = {(s, d): doc for s, d, doc in store.query(f"SELECT site_id, device_id, document FROM twin WHERE site_id IN {sites}")}
    bad_twins = [k for k, (_position, values) in last.items() if reported(twins.get(k, "{}")) != values]
    check.equal("twins that differ from the last reading (first 5)", bad_twins[:5], [])

    # Books: every record of the topic has exactly one outcome.
    records = kafka.length(READINGS)
    if not args.deleted:
        check.equal("records that can be read of device.telemetry.v1", len(kafka.read(READINGS)), records)
    expected_records = len(readings) + repeats + poisoned.get(READINGS, 0)
    if args.redelivery:
        check.true(f"records on device.telemetry.v1: {records} of at least {expected_records}", records >= expected_records)
    else:
        check.equal("records on device.telemetry.v1", records, expected_records)
    for group in ("bridge_data", "evaluate_rules", "update_twin"):
        books = kafka.books(group).get("device.telemetry.v1", Counter())
        check.equal(f"{group}: sum of outcomes on device.telemetry.v1", sum(books.values()), records)
    if args.threshold is not None:
        # A reading that comes after a newer one of its device raises nothing, so order decides about alerts.
        ignored = kafka.books("evaluate_rules").get("device.telemetry.v1", Counter())["ignored"]
        check.equal("evaluate_rules: readings out of order", ignored, late)
    books = kafka.books("bridge_data").get("device.telemetry.v1", Counter())
    outcomes = {"emitted": len(readings), "duplicate": records - len(readings) - poisoned.get(READINGS, 0),
                "dead_lettered": poisoned.get(READINGS, 0)}
    check.equal("bridge_data: outcomes", nonzero(books), nonzero(outcomes))
    if not args.deleted:
        check.equal("records on data_core.reading.v1", len(kafka.read(CHECKED)), len(readings) + poisoned.get(CHECKED, 0))
    check.equal("load_warehouse: outcomes on data_core.reading.v1", nonzero(stored_books(CHECKED)),
                nonzero({"emitted": len(readings), "dead_lettered": poisoned.get(CHECKED, 0)}))

    # Alerts: each raise and clear once.
    if args.threshold is not None:
        raised, cleared = alerts()
        check.equal("alerts raised", raised, raises)
        check.equal("alerts cleared", cleared, clears)
        # The table holds one row an alert, however often it was told; the topic has each raise and clear once.
        if args.only_rule:
            records_told = len(kafka.read(ALERTS))
            check.equal(f"records on {ALERTS}", records_told, sum(raises.values()) + sum(clears.values()))

    # Notifications: each raise and clear at least once, repeats under the same key and with the same content.
    if args.webhook:
        told = told_alerts(args.webhook)
        check.equal("keys under which different alerts were told", [k for k, v in told.items() if len(v) > 1][:5], [])
        contents = Counter(content for found in told.values() for content in found)
        check.equal("alerts told under several keys", [c for c, n in contents.items() if n > 1][:5], [])
        for state, wanted in (("raised", raises), ("cleared", clears)):
            by_device = Counter((site, device) for found, site, device, _alert in contents if found == state)
            check.equal(f"alerts told as {state}", by_device, wanted)
        counted = kafka.books("notify")
        for topic in (ALERTS, ASIDE):
            length = len(kafka.read(topic))
            check.equal(f"notify: outcomes on {topic}", nonzero(counted.get(topic, Counter())),
                        nonzero({"emitted": length}))
    else:
        check.equal(f"records in {ASIDE}", len(kafka.read(ASIDE)) if ASIDE in kafka.topics() else 0, 0)

    if check.failures:
        print("\n".join(f"DIFFERENCE {f[:2000]}" for f in check.failures))
        sys.exit(1)
    print(json.dumps({"readings": len(readings), "repeats": repeats, "garbage": sum(garbage.values()),
                      "poison": poisoned, "late": late, "records": records}))


def nonzero(counts):
    return {name: n for name, n in counts.items() if n}


def reported(document):
    return {name: field["value"] for name, field in json.loads(document).get("reported", {}).items()}


if __name__ == "__main__":
    main()
