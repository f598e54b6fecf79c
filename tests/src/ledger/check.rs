//! What a restored cluster must hold of a ledger, and whether it does. Pure, but for reading the rows.

use std::collections::BTreeMap;
use std::time::SystemTime;

use super::{Entry, LedgerLog};
use crate::lsn;
use crate::postgres::PgCluster;

/// What is expected of a restore. The parts add up.
#[derive(Clone, Copy, Debug, Default)]
pub struct Expect {
    everything: bool,
    held_through: Option<u64>,
    nothing_from: Option<u64>,
    held_before_time: Option<SystemTime>,
    nothing_after_time: Option<SystemTime>,
}

impl Expect {
    /// Every acknowledged commit.
    #[must_use]
    pub fn everything() -> Self {
        Self {
            everything: true,
            ..Self::default()
        }
    }

    /// Every commit that ended at or before `flush`, for instance the highest reported flush position.
    #[must_use]
    pub fn held_through(flush: u64) -> Self {
        Self {
            held_through: Some(flush),
            ..Self::default()
        }
    }

    /// The state at a WAL position: everything that ended at or before it, nothing that began at or after it.
    #[must_use]
    pub fn at_lsn(target: u64) -> Self {
        Self {
            held_through: Some(target),
            nothing_from: Some(target),
            ..Self::default()
        }
    }

    /// The state at a time: everything acknowledged before it, nothing sent after it.
    #[must_use]
    pub fn at_time(target: SystemTime) -> Self {
        Self {
            held_before_time: Some(target),
            nothing_after_time: Some(target),
            ..Self::default()
        }
    }

    fn must_hold(&self, entry: &Entry) -> bool {
        let by_lsn = self
            .held_through
            .zip(entry.after)
            .is_some_and(|(through, after)| after <= through);
        let by_time = self
            .held_before_time
            .is_some_and(|target| entry.acknowledged < target);
        self.everything || by_lsn || by_time
    }

    fn must_not_hold(&self, entry: &Entry) -> bool {
        let by_lsn = self.nothing_from.is_some_and(|from| entry.before >= from);
        let by_time = self.nothing_after_time.is_some_and(|target| entry.sent > target);
        by_lsn || by_time
    }
}

/// What a restored cluster was found to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// Rows in the restored ledger.
    pub held: u64,
    /// Acknowledged commits that were expected.
    pub expected: u64,
    /// Acknowledged commits that are not there; none of them was expected.
    pub missing: u64,
}

impl LedgerLog {
    /// Reads the ledger of `restored` and checks it.
    ///
    /// # Errors
    /// Every way in which the restored rows contradict the notes.
    pub async fn check(&self, restored: &PgCluster, expect: Expect) -> anyhow::Result<Report> {
        // What ends before the table was made holds no row.
        let begun = restored.value("SELECT to_regclass('ledger') IS NOT NULL").await?;
        let rows = match begun.as_str() {
            "t" => {
                restored
                    .sql("SELECT client, number FROM ledger ORDER BY client, number")
                    .await?
            }
            _ => Vec::new(),
        };
        let mut held: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
        for row in rows {
            let cell = |at: usize| row.get(at).cloned().flatten().unwrap_or_default();
            held.entry(cell(0).parse()?).or_default().push(cell(1).parse()?);
        }
        self.check_rows(&held, expect)
    }

    /// Checks rows, sorted by number for each client.
    ///
    /// # Errors
    /// As [`LedgerLog::check`].
    pub fn check_rows(&self, held: &BTreeMap<u32, Vec<u64>>, expect: Expect) -> anyhow::Result<Report> {
        let mut faults = self.gaps(held);
        let holds = |entry: &Entry| {
            held.get(&entry.client)
                .is_some_and(|rows| rows.binary_search(&entry.number).is_ok())
        };
        for entry in &self.entries {
            match (holds(entry), expect.must_hold(entry), expect.must_not_hold(entry)) {
                (false, true, _) => faults.push(format!("lost: {}", show(entry))),
                (true, _, true) => faults.push(format!("past the target: {}", show(entry))),
                _ => {}
            }
        }
        faults.extend(self.disorder(holds));
        if !faults.is_empty() {
            let shown = faults.len().min(10);
            anyhow::bail!(
                "{} contradictions to the ledger, the first of them:\n{}",
                faults.len(),
                faults[..shown].join("\n")
            );
        }
        let count = |wanted: &dyn Fn(&Entry) -> bool| {
            self.entries.iter().filter(|entry| wanted(entry)).count() as u64
        };
        Ok(Report {
            held: held.values().map(|rows| rows.len() as u64).sum(),
            expected: count(&|entry| expect.must_hold(entry)),
            missing: count(&|entry| !holds(entry)),
        })
    }

    /// Rows of one client must be 1, 2, 3, ...; at most the one in flight may be there unacknowledged.
    fn gaps(&self, held: &BTreeMap<u32, Vec<u64>>) -> Vec<String> {
        let mut faults = Vec::new();
        for (client, rows) in held {
            let first_wrong = rows
                .iter()
                .zip(1..)
                .find(|(number, expected)| **number != *expected);
            if let Some((number, expected)) = first_wrong {
                faults.push(format!(
                    "client {client}: row {expected} is missing before row {number}"
                ));
            }
            let acknowledged = self
                .entries
                .iter()
                .filter(|entry| entry.client == *client)
                .map(|entry| entry.number)
                .max();
            let last = rows.last().copied().unwrap_or(0);
            if last > acknowledged.unwrap_or(0) + 1 {
                faults.push(format!("client {client}: row {last} was never sent"));
            }
        }
        faults
    }

    /// No commit may be there while one that had ended before it began is missing.
    fn disorder(&self, holds: impl Fn(&Entry) -> bool) -> Option<String> {
        let missing = self
            .entries
            .iter()
            .filter(|entry| !holds(entry) && entry.after.is_some());
        let first_missing = missing.min_by_key(|entry| entry.after)?;
        let last_held = self
            .entries
            .iter()
            .filter(|entry| holds(entry))
            .max_by_key(|entry| entry.before)?;
        (last_held.before >= first_missing.after?).then(|| {
            format!(
                "out of order: missing {}, but held {}",
                show(first_missing),
                show(last_held)
            )
        })
    }
}

fn show(entry: &Entry) -> String {
    let after = entry.after.map_or_else(|| "?".to_owned(), lsn::show);
    format!(
        "client {} row {} between {} and {after}",
        entry.client,
        entry.number,
        lsn::show(entry.before)
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// One client, one commit every ten bytes and every second.
    fn log(count: u64) -> LedgerLog {
        let time = |number: u64, millis| {
            SystemTime::UNIX_EPOCH + Duration::from_secs(number) + Duration::from_millis(millis)
        };
        let entry = |number: u64| Entry {
            client: 0,
            number,
            before: number * 10,
            after: Some(number * 10 + 10),
            sent: time(number, 0),
            acknowledged: time(number, 500),
        };
        LedgerLog {
            entries: (1..=count).map(entry).collect(),
        }
    }

    fn rows(numbers: impl IntoIterator<Item = u64>) -> BTreeMap<u32, Vec<u64>> {
        BTreeMap::from([(0, numbers.into_iter().collect())])
    }

    fn fault(held: &BTreeMap<u32, Vec<u64>>, expect: Expect) -> String {
        log(5).check_rows(held, expect).unwrap_err().to_string()
    }

    #[test]
    fn what_was_acknowledged_and_perhaps_one_more_is_right() {
        for last in [5, 6] {
            let report = log(5).check_rows(&rows(1..=last), Expect::everything()).unwrap();
            assert_eq!(
                report,
                Report {
                    held: last,
                    expected: 5,
                    missing: 0
                }
            );
        }
        assert!(fault(&rows(1..=7), Expect::everything()).contains("row 7 was never sent"));
    }

    #[test]
    fn a_lost_commit_is_found() {
        assert!(fault(&rows(1..=4), Expect::everything()).contains("lost: client 0 row 5"));
        assert!(fault(&rows(1..=2), Expect::held_through(40)).contains("lost: client 0 row 3"));
        assert!(fault(&BTreeMap::new(), Expect::everything()).contains("5 contradictions"));
        let report = log(5).check_rows(&rows(1..=3), Expect::held_through(40)).unwrap();
        assert_eq!(
            report,
            Report {
                held: 3,
                expected: 3,
                missing: 2
            }
        );
    }

    #[test]
    fn a_gap_and_a_wrong_order_are_found() {
        let found = fault(&rows([1, 2, 4]), Expect::default());
        assert!(found.contains("row 3 is missing before row 4"), "{found}");
        assert!(found.contains("out of order"), "{found}");
    }

    #[test]
    fn a_commit_past_the_target_is_found() {
        assert!(fault(&rows(1..=4), Expect::at_lsn(40)).contains("past the target: client 0 row 4"));
        assert!(log(5).check_rows(&rows(1..=3), Expect::at_lsn(40)).is_ok());
        let time = SystemTime::UNIX_EPOCH + Duration::from_millis(3800);
        assert!(fault(&rows(1..=4), Expect::at_time(time)).contains("past the target: client 0 row 4"));
        assert!(fault(&rows(1..=2), Expect::at_time(time)).contains("lost: client 0 row 3"));
        assert!(log(5).check_rows(&rows(1..=3), Expect::at_time(time)).is_ok());
    }
}
