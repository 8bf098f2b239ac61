//! Dead letters of decide stages, byte for byte.

use super::*;

#[test]
fn a_message_as_long_as_a_record_is_cut_in_its_letter() {
    let world = World::new(&[INPUT], 1);
    // Each character has two bytes, so that the bound falls between two of them or into one.
    let key = "é".repeat(350_000);
    world.say(&key, "nonsense");
    let (mut running, _) = world.start("i");
    world.settle(&mut running);
    let letters = world.cluster.records(DLT);
    let [letter] = &letters[..] else { panic!("one letter: {}", letters.len()) };
    assert_eq!(letter.key_text(), key, "the record itself is whole");
    let message = letter.header("__connect.errors.exception.message").expect("it says why");
    assert!((1_020..=1_024).contains(&message.len()), "{} bytes", message.len());
    assert!(std::str::from_utf8(message).is_ok_and(|text| text.starts_with("`éé")));
}

#[test]
fn a_dead_letter_keeps_every_byte_and_carries_the_headers_of_connect_and_spring() {
    let world = World::new(&[INPUT], 1);
    world.say("a", "skip");
    let own: [(&str, &[u8]); 3] = [("traceparent", b"00-ab"), ("x", &[0, 255]), ("x", b"")];
    let value: &[u8] = &[7, 0, 159, 146, 150];
    world.cluster.append(INPUT, 0, Some(&[255, 0]), Some(value), own);
    let (mut running, _) = world.start("i");
    world.settle(&mut running);
    let letters = world.cluster.records(DLT);
    let [letter] = &letters[..] else { panic!("{letters:?}") };
    assert_eq!((letter.key.as_deref(), letter.value.as_deref()), (Some([255, 0].as_slice()), Some(value)));
    for (kept, own) in letter.headers.iter().zip(own) {
        assert_eq!((kept.0.as_str(), kept.1.as_slice()), own);
    }
    let time_ms = world.cluster.records(INPUT)[1].time.as_millis();
    let expected: [(&str, &[u8]); 14] = [
        ("__connect.errors.topic", INPUT.as_bytes()),
        ("__connect.errors.partition", b"0"),
        ("__connect.errors.offset", b"1"),
        ("__connect.errors.connector.name", GROUP.as_bytes()),
        ("__connect.errors.task.id", b"0"),
        ("__connect.errors.stage", b"TRANSFORMATION"),
        ("__connect.errors.class.name", b"throughline.stages.count_things"),
        ("__connect.errors.exception.class.name", b"garbage"),
        ("__connect.errors.exception.message", "`none` says something unknown".as_bytes()),
        ("kafka_dlt-original-topic", INPUT.as_bytes()),
        ("kafka_dlt-original-consumer-group", GROUP.as_bytes()),
        ("kafka_dlt-original-partition", &[0, 0, 0, 0]),
        ("kafka_dlt-original-offset", &[0, 0, 0, 0, 0, 0, 0, 1]),
        ("kafka_dlt-original-timestamp", &time_ms.to_be_bytes()),
    ];
    for (name, value) in expected {
        assert_eq!(letter.header(name), Some(value), "{name}");
    }
    assert_eq!(letter.headers.len(), own.len() + expected.len(), "and no others");
    assert_eq!(books(&world).of(Outcome::DeadLettered), 1);
}

#[test]
fn a_replay_that_fails_again_keeps_its_first_origin_and_is_parked_in_the_end() {
    let world = World::new(&[INPUT], 1);
    world.say("a", "bad");
    let (mut running, _) = world.start("i");
    world.settle(&mut running);
    let first_letter = world.cluster.records(DLT).remove(0);
    let replay = |count: &str| {
        let mut headers = first_letter.headers.clone();
        headers.push(("tl-replay-id".to_owned(), b"r-1".to_vec()));
        headers.push(("tl-replay-count".to_owned(), count.as_bytes().to_vec()));
        world.clock.advance(Duration::from_secs(60));
        let headers = headers.iter().map(|(n, v)| (n.as_str(), v.as_slice()));
        world.cluster.append(REPLAY, 0, first_letter.key.as_deref(), Some(b"bad"), headers);
    };
    replay("3");
    world.settle(&mut running);
    let again = world.cluster.records(DLT).remove(1);
    for name in ["__connect.errors.topic", "__connect.errors.offset", "kafka_dlt-original-timestamp"] {
        assert_eq!(again.header(name), first_letter.header(name), "{name}");
        assert_eq!(again.headers.iter().filter(|(n, _)| n == name).count(), 1, "{name} once");
    }
    let error = "__connect.errors.exception.class.name";
    assert_eq!(again.headers.iter().filter(|(n, _)| n == error).count(), 1, "the error is replaced");
    assert_eq!(again.header("tl-replay-count"), Some(b"3".as_slice()));
    replay("10");
    world.settle(&mut running);
    assert_eq!(world.cluster.records(DLT).len(), 2);
    assert_eq!(world.cluster.records("device.thing.v1.count_things-parking").len(), 1);
    // A record that somebody put into the replay topic by hand has no origin yet.
    world.cluster.append(REPLAY, 0, Some(b"a"), Some(b"bad"), []);
    world.settle(&mut running);
    let by_hand = world.cluster.records(DLT).remove(2);
    assert_eq!(by_hand.header("kafka_dlt-original-topic"), Some(REPLAY.as_bytes()));
    assert_eq!(by_hand.header("tl-replay-count"), Some(b"1".as_slice()));
}
