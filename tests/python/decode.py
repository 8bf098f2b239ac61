#!/usr/bin/env python3
"""Prints every record of a topic as JSON, decoded by confluent-kafka against the registry."""

import json
import sys

from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroDeserializer
from confluent_kafka.serialization import MessageField, SerializationContext

bootstrap, registry, topic = sys.argv[1:4]
decode = AvroDeserializer(SchemaRegistryClient({"url": registry}))
consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "decode", "enable.auto.commit": False,
                     "enable.partition.eof": True, "isolation.level": "read_committed"})
partitions = sorted(consumer.list_topics(topic, timeout=20).topics[topic].partitions)
consumer.assign([TopicPartition(topic, p, 0) for p in partitions])
open_partitions = set(partitions)
while open_partitions:
    message = consumer.poll(10)
    if message is None:
        sys.exit(f"{topic}: partitions {sorted(open_partitions)} do not answer")
    if message.error():
        open_partitions.discard(message.partition())
        continue
    value = decode(message.value(), SerializationContext(topic, MessageField.VALUE))
    print(json.dumps(value, default=str))
consumer.close()
