//! Compares records with what a scenario expects of them.

use super::Found;
use serde_json::Value;
use std::collections::BTreeMap;
use throughline_model::codec::Codec;

/// Fields by name, as a scenario states them.
type Fields = BTreeMap<String, Value>;

/// Reads records as JSON, in order within their key and by key among each other; of a compacted topic the
/// newest of each key.
pub fn in_order(found: Vec<Found>, is_compacted: bool, codec: &Codec) -> Vec<Value> {
    let mut by_key: BTreeMap<String, Vec<Option<Vec<u8>>>> = BTreeMap::new();
    for record in found {
        let records = by_key.entry(record.key).or_default();
        if is_compacted {
            records.clear();
        }
        records.push(record.value);
    }
    let read = |value: Vec<u8>| {
        codec
            .decode(Some(&value))
            .unwrap_or_else(|e| Value::String(format!("a value that does not read: {e}")))
    };
    by_key.into_values().flatten().flatten().map(read).collect()
}

/// Returns the differences: the place, what was expected there, and what was found.
pub fn records(expected: &[Fields], found: &[Value]) -> Vec<(String, String, String)> {
    let mut expected: Vec<&Fields> = expected.iter().collect();
    expected.sort_by_key(|fields| fields.get("device_id").and_then(Value::as_str).unwrap_or_default());
    let mut differences = Vec::new();
    for (index, (expected, found)) in expected.iter().zip(found).enumerate() {
        for (name, value) in *expected {
            difference(&format!("[{index}].{name}"), value, &found[name], &mut differences);
        }
    }
    if expected.len() != found.len() {
        let names: Vec<&String> = expected.iter().flat_map(|fields| fields.keys()).collect();
        let shown: Vec<String> = found.iter().map(|record| shown(record, &names)).collect();
        let counts =
            (format!("{} records", expected.len()), format!("{}: {}", found.len(), shown.join(", ")));
        differences.push((String::new(), counts.0, counts.1));
    }
    differences
}

/// Every field that is expected must be there, lists element by element; numbers are equal as numbers.
fn difference(place: &str, expected: &Value, found: &Value, out: &mut Vec<(String, String, String)>) {
    let is_equal = match (expected, found) {
        (Value::Object(fields), Value::Object(_)) => {
            for (name, value) in fields {
                difference(&format!("{place}.{name}"), value, &found[name], out);
            }
            true
        }
        (Value::Array(list), Value::Array(others)) if list.len() == others.len() => {
            for (index, (value, other)) in list.iter().zip(others).enumerate() {
                difference(&format!("{place}[{index}]"), value, other, out);
            }
            true
        }
        (Value::Number(number), Value::Number(other)) => number.as_f64() == other.as_f64(),
        _ => expected == found,
    };
    if !is_equal {
        out.push((place.to_owned(), expected.to_string(), found.to_string()));
    }
}

/// Shows a record by the fields that the scenario is about, or whole where it names none.
fn shown(record: &Value, names: &[&String]) -> String {
    let Value::Object(fields) = record else { return record.to_string() };
    let is_shown = |name: &String| names.is_empty() || names.contains(&name);
    let shown: serde_json::Map<String, Value> =
        fields.iter().filter(|(name, _)| is_shown(name)).map(|(n, v)| (n.clone(), v.clone())).collect();
    Value::Object(shown).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fields(value: Value) -> Fields {
        serde_json::from_value(value).expect("an object")
    }

    #[test]
    fn only_the_named_fields_count_and_a_difference_names_its_place() {
        let found = [json!({"state": "raised", "n": 1.0, "values": [{"name": "t", "number": 91}]})];
        let expected = [fields(json!({"n": 1, "values": [{"number": 91.0}]}))];
        assert_eq!(records(&expected, &found), []);
        let expected = [fields(json!({"values": [{"number": 90}], "gone": true}))];
        let places: Vec<String> = records(&expected, &found).into_iter().map(|(place, ..)| place).collect();
        assert_eq!(places, ["[0].gone", "[0].values[0].number"]);
        let missing = records(&[], &found);
        assert!(missing[0].1 == "0 records" && missing[0].2.starts_with("1: {"), "{missing:?}");
    }

    #[test]
    fn records_come_by_key_and_of_a_compacted_topic_the_newest() {
        let found = |key: &str, value: &str| Found {
            key: key.to_owned(),
            value: Some(value.as_bytes().to_vec()),
            reason: None,
        };
        let all = vec![found("s/b", "1"), found("s/a", "2"), found("s/b", "3")];
        assert_eq!(in_order(all.clone(), false, &Codec::default()).len(), 3);
        assert_eq!(in_order(all, true, &Codec::default()).len(), 2);
    }
}
