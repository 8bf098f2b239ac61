//! Folds the keyed rows of one write to one row a key.
//!
//! `INSERT … ON CONFLICT` of PostgreSQL refuses to touch a row twice, and fewer rows cost less everywhere.

use std::collections::HashMap;
use throughline_model::rows::{AlertRow, TwinRow};

/// Folds raises and clears in order: the first row of an alert stays, a clear closes it, and nothing
/// reopens it. The statements of both stores do the same with the row they meet.
pub(crate) fn fold_alerts(rows: &[AlertRow]) -> Vec<AlertRow> {
    let mut folded: Vec<AlertRow> = Vec::with_capacity(rows.len());
    let mut places: HashMap<&str, usize> = HashMap::with_capacity(rows.len());
    for row in rows {
        let Some(&place) = places.get(row.alert_id.as_str()) else {
            places.insert(&row.alert_id, folded.len());
            folded.push(row.clone());
            continue;
        };
        let known = &mut folded[place];
        if known.cleared_at.is_none() && row.cleared_at.is_some() {
            known.state.clone_from(&row.state);
            known.cleared_at = row.cleared_at;
        }
    }
    folded
}

/// Twins to remove and then twins to put, at most one row a device in each.
#[derive(Debug, Default)]
pub(crate) struct FoldedTwins<'a> {
    pub removals: Vec<&'a TwinRow>,
    pub puts: Vec<&'a TwinRow>,
}

/// Keeps the last row of each device, but none that is older than one before it: a write may hold rows of
/// a replay besides. The statements of both stores do the same with the row they meet, which is why a
/// removal stays where a put follows: what begins after it is not older than what was removed.
pub(crate) fn fold_twins(rows: &[TwinRow]) -> FoldedTwins<'_> {
    type Rows<'r> = (Option<&'r TwinRow>, Option<&'r TwinRow>);
    let mut last: HashMap<(&str, &str), Rows<'_>> = HashMap::with_capacity(rows.len());
    for row in rows {
        let (removal, put) = last.entry((&row.site_id, &row.device_id)).or_default();
        if row.is_removal() {
            (*removal, *put) = (Some(row), None);
        } else if put.is_none_or(|known| !row.is_older_than(known)) {
            *put = Some(row);
        }
    }
    let mut folded = FoldedTwins::default();
    for (removal, put) in last.into_values() {
        folded.removals.extend(removal);
        folded.puts.extend(put);
    }
    // In key order, so that two writers lock rows in the same order and cannot deadlock.
    folded.puts.sort_unstable_by_key(|t| (t.site_id.as_str(), t.device_id.as_str()));
    folded.removals.sort_unstable_by_key(|t| (t.site_id.as_str(), t.device_id.as_str()));
    folded
}

#[cfg(test)]
mod tests {
    use super::*;
    use throughline_model::time::Timestamp;

    fn alert(id: &str, cleared: Option<i64>, summary: &str) -> AlertRow {
        AlertRow {
            alert_id: id.into(),
            state: if cleared.is_some() { "cleared" } else { "raised" }.into(),
            cleared_at: cleared.map(Timestamp),
            summary: summary.into(),
            ..AlertRow::default()
        }
    }

    #[test]
    fn a_clear_closes_its_raise_and_an_older_raise_does_not_reopen_it() {
        let folded = fold_alerts(&[
            alert("a", None, "first"),
            alert("b", Some(5), "clear without its raise"),
            alert("a", Some(9), "second"),
            alert("a", None, "again"),
            alert("b", None, "late raise"),
            alert("a", Some(11), "third"),
        ]);
        let seen: Vec<_> = folded
            .iter()
            .map(|a| (a.alert_id.as_str(), a.state.as_str(), a.cleared_at.map(|t| t.0), a.summary.as_str()))
            .collect();
        assert_eq!(
            seen,
            [("a", "cleared", Some(9), "first"), ("b", "cleared", Some(5), "clear without its raise")]
        );
    }

    #[test]
    fn the_last_row_of_a_device_wins_whether_put_or_removal() {
        let put = |device: &str, version| TwinRow {
            device_id: device.into(),
            reported_version: version,
            document: "{}".into(),
            ..TwinRow::default()
        };
        let rows = [put("b", 1), put("a", 1), TwinRow::removal("", "b"), put("a", 2), put("c", 1)];
        let folded = fold_twins(&rows);
        let puts: Vec<_> = folded.puts.iter().map(|t| (t.device_id.as_str(), t.reported_version)).collect();
        assert_eq!(puts, [("a", 2), ("c", 1)]);
        assert_eq!(folded.removals.len(), 1);
        assert_eq!(folded.removals[0].device_id, "b");
        let rows = [put("a", 3), put("a", 2), TwinRow::removal("", "b"), put("b", 1)];
        let folded = fold_twins(&rows);
        let puts: Vec<_> = folded.puts.iter().map(|t| (t.device_id.as_str(), t.reported_version)).collect();
        assert_eq!(puts, [("a", 3), ("b", 1)], "an older one does not win, one after a removal does");
        assert_eq!(folded.removals.len(), 1, "the removal comes first");
    }
}
