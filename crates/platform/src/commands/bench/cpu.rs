//! CPU time of processes as Linux counts it, in ticks of 10 ms.

use serde::Serialize;

/// Ticks a second in `/proc`: `USER_HZ`, which is 100 on every architecture that we build for.
const TICKS_PER_SECOND: f64 = 100.0;

/// Whose CPU time is looked at.
#[derive(Clone, Copy, Debug, Default)]
pub struct Processes {
    /// The role.
    pub role: Option<u32>,
    /// Kafka, where it was started here.
    pub broker: Option<u32>,
    /// PostgreSQL's first process, where it was started here.
    pub database: Option<u32>,
}

/// CPU seconds, by process.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Spent {
    /// The role.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<f64>,
    /// Kafka.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub broker: Option<f64>,
    /// This process: the generator, or the plain client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bench: Option<f64>,
    /// PostgreSQL with all its backends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub database: Option<f64>,
}

impl Processes {
    /// Returns the CPU time spent since their starts.
    pub fn spent(&self) -> Spent {
        Spent {
            role: self.role.and_then(|pid| own(&pid.to_string())),
            broker: self.broker.and_then(|pid| own(&pid.to_string())),
            bench: own("self"),
            database: self.database.and_then(with_children),
        }
    }
}

impl Spent {
    /// Returns what was spent since `before`; where nothing was measured before, all of it.
    pub fn since(&self, before: &Self) -> Self {
        let less = |now: Option<f64>, before: Option<f64>| now.map(|now| now - before.unwrap_or_default());
        Self {
            role: less(self.role, before.role),
            broker: less(self.broker, before.broker),
            bench: less(self.bench, before.bench),
            database: less(self.database, before.database),
        }
    }

    /// Returns it per million of `messages`.
    pub fn per_million(&self, messages: u64) -> Self {
        let scale = |spent: Option<f64>| spent.map(|spent| spent * 1e6 / messages.max(1) as f64);
        Self {
            role: scale(self.role),
            broker: scale(self.broker),
            bench: scale(self.bench),
            database: scale(self.database),
        }
    }
}

/// The fields of `/proc/PID/stat` from the state on: see proc(5).
struct Stat(Vec<String>);

impl Stat {
    fn read(process: &str) -> Option<Self> {
        Self::parse(&std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        // The program's name is in brackets and may itself contain brackets and spaces.
        let (_, rest) = text.rsplit_once(") ")?;
        Some(Self(rest.split_whitespace().map(str::to_owned).collect()))
    }

    fn parent(&self) -> Option<u32> {
        self.0.get(1)?.parse().ok()
    }

    /// Seconds of user and system time of the process.
    fn own(&self) -> Option<f64> {
        self.seconds(11)
    }

    /// Seconds of user and system time of its children that have ended.
    fn ended_children(&self) -> Option<f64> {
        self.seconds(13)
    }

    fn seconds(&self, at: usize) -> Option<f64> {
        let ticks = |at: usize| self.0.get(at)?.parse::<f64>().ok();
        Some((ticks(at)? + ticks(at + 1)?) / TICKS_PER_SECOND)
    }
}

fn own(process: &str) -> Option<f64> {
    Stat::read(process)?.own()
}

/// A process with its children, those that run and those that have ended.
fn with_children(pid: u32) -> Option<f64> {
    let stat = Stat::read(&pid.to_string())?;
    let mut sum = stat.own()? + stat.ended_children()?;
    for entry in std::fs::read_dir("/proc").ok()?.flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str().filter(|name| name.bytes().all(|b| b.is_ascii_digit())) else {
            continue;
        };
        // A process that ended meanwhile is counted with its parent the next time.
        if let Some(child) = Stat::read(name).filter(|child| child.parent() == Some(pid)) {
            sum += child.own().unwrap_or_default();
        }
    }
    Some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_does_not_shift_the_fields() {
        let line = "77 (a) b) S 12 77 77 0 -1 4194304 1 2 3 4 150 50 30 20 20 0 1 0 9";
        let stat = Stat::parse(line).expect("a line of proc(5)");
        assert_eq!(stat.parent(), Some(12));
        assert_eq!((stat.own(), stat.ended_children()), (Some(2.0), Some(0.5)));
    }

    #[test]
    fn what_was_not_measured_stays_absent() {
        let before = Spent { role: None, broker: Some(1.0), bench: Some(1.0), database: None };
        let after = Spent { role: Some(3.0), broker: Some(2.0), bench: Some(1.0), database: None };
        let spent = after.since(&before).per_million(500_000);
        assert_eq!((spent.role, spent.broker, spent.bench), (Some(6.0), Some(2.0), Some(0.0)));
        assert_eq!(spent.database, None);
    }
}
