//! How a process is named in claims, and whether a named one is known to have ended.
//!
//! Owns: this process's name, and what the system says of another on the same machine. Does not own what follows from
//! it ([`super::judge`]).

use std::hash::{BuildHasher as _, Hasher as _, RandomState};

use highwater_format::Writer;

/// How this process names itself in claims and pulses.
#[derive(Clone, Debug)]
pub struct Me {
    /// Random, so that a process that was started again is another one.
    pub instance: String,
    /// The machine.
    pub host: String,
    /// The process there.
    pub pid: u32,
    /// Where that number means this process, and its server's address: who follows it there is beside the same server, and not beside a
    /// copy on the same machine. None where the system does not say.
    pub machine: Option<String>,
}

impl Me {
    /// A name that no other process has.
    pub fn new_instance() -> String {
        format!("{:016x}", RandomState::new().build_hasher().finish())
    }

    /// This process, beside the server of this address.
    pub fn beside(server: &str) -> Self {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let host = match host.trim() {
            "" => "unknown",
            name => name,
        };
        Self {
            instance: Self::new_instance(),
            host: host.to_owned(),
            pid: std::process::id(),
            machine: machine().map(|machine| format!("{machine} {server}")),
        }
    }

    /// Whether the process of a claim has ended: it was one of this machine, and its number is nobody's, or ours. False
    /// where that cannot be said.
    pub fn knows_to_be_gone(&self, claim: &Writer) -> bool {
        if claim.instance == self.instance || self.machine.is_none() || claim.machine != self.machine {
            return false;
        }
        claim.pid == self.pid || has_ended(claim.pid)
    }
}

/// Process numbers mean the same within one boot of a machine and one namespace.
fn machine() -> Option<String> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let namespace = std::fs::read_link("/proc/self/ns/pid").ok()?;
    Some(format!("{} {}", boot.trim(), namespace.display()))
}

/// Whether no process has this number any more; one that only waits to be collected by its parent has ended too.
fn has_ended(pid: u32) -> bool {
    let Some(number) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) else {
        return false;
    };
    if rustix::process::test_kill_process(number) == Err(rustix::io::Errno::SRCH) {
        return true;
    }
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name before the state is in parentheses, and may hold some.
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    matches!(state, Some('Z' | 'X'))
}

#[cfg(test)]
mod tests {
    use highwater_format::{Time, TimelineId};

    use super::*;

    fn claim(me: &Me, pid: u32) -> Writer {
        Writer {
            epoch: 1,
            instance: "another".to_owned(),
            host: me.host.clone(),
            pid,
            timeline: TimelineId::FIRST,
            claimed_at: Time::UNIX_EPOCH,
            begins: None,
            machine: me.machine.clone(),
            interval_ms: None,
        }
    }

    #[test]
    fn only_what_ended_on_this_machine_is_known_to_be_gone() {
        let me = Me::beside("port=5432");
        assert!(me.machine.is_some() && me.machine != Me::beside("port=5433").machine);
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let of_the_child = claim(&me, child.id());
        assert!(!me.knows_to_be_gone(&of_the_child), "it lives");
        child.kill().unwrap();
        while !has_ended(child.id()) {
            std::thread::yield_now();
        }
        assert!(me.knows_to_be_gone(&of_the_child), "nobody has collected it yet");
        child.wait().unwrap();
        assert!(me.knows_to_be_gone(&of_the_child));
        let elsewhere = Writer {
            machine: Some("another boot".to_owned()),
            ..of_the_child.clone()
        };
        let earlier = Writer {
            machine: None,
            ..of_the_child
        };
        assert!(!me.knows_to_be_gone(&elsewhere) && !me.knows_to_be_gone(&earlier));
        assert!(
            me.knows_to_be_gone(&claim(&me, me.pid)),
            "we have that number now"
        );
        let own = Writer {
            instance: me.instance.clone(),
            ..claim(&me, me.pid)
        };
        assert!(!me.knows_to_be_gone(&own));
    }
}
