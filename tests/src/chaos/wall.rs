//! Packets that are dropped: connections stay open and silent, as behind a broken switch.

use std::io::Write;
use std::process::{Command, Stdio};

/// Drops the packets from and to some ports of this machine until it is dropped itself.
pub struct Wall {
    table: String,
}

impl Wall {
    /// Builds it; `None` where this machine does not let us (nftables, as root).
    pub fn build(ports: &[u16]) -> Option<Self> {
        let first = ports.first()?;
        // Named after a port, so that several runs at once leave each other's alone.
        let table = format!("inet throughline_chaos_{first}");
        let all: Vec<String> = ports.iter().map(u16::to_string).collect();
        let ports = all.join(", ");
        let rules = format!(
            "add table {table}\ndelete table {table}\nadd table {table}\n\
             add chain {table} drops {{ type filter hook input priority 0; }}\n\
             add rule {table} drops tcp dport {{ {ports} }} drop\n\
             add rule {table} drops tcp sport {{ {ports} }} drop\n"
        );
        nft(&rules).then_some(Self { table })
    }

    /// Says whether one can be built here.
    pub fn is_permitted() -> bool {
        Self::build(&[1]).is_some()
    }
}

fn nft(rules: &str) -> bool {
    let mut nft = Command::new("nft");
    let nft = nft.args(["-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let Ok(mut running) = nft.spawn() else { return false };
    let written = running.stdin.take().is_some_and(|mut to| to.write_all(rules.as_bytes()).is_ok());
    running.wait().is_ok_and(|status| status.success()) && written
}

impl Drop for Wall {
    fn drop(&mut self) {
        let removed = nft(&format!("delete table {}\n", self.table));
        assert!(
            removed || std::thread::panicking(),
            "packets are dropped for good: nft delete table {}",
            self.table
        );
    }
}
