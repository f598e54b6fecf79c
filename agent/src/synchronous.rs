//! Whether commits wait for this agent, and whether anybody meant them to.
//!
//! Owns: reading `synchronous_standby_names` as the server does, what it makes of an agent, and the words for it. Does
//! not own: the setting, which is the server's and may change at any moment ([`crate::outage`] and the receiver look),
//! nor how the agent acknowledges ([`crate::acknowledge`]).
//!
//! The server goes by names alone: any connection that streams WAL, bears a listed name and reports a flush position is a
//! synchronous standby, `*` lists everybody. One that reports no flush position never is.

use highwater_config::{Acknowledge, WalConfig};
use serde::Serialize;

use crate::state::State;

/// How the agent names itself to the server when it streams.
pub const APPLICATION_NAME: &str = "highwater";

/// The server's setting.
pub(crate) const SETTING: &str = "synchronous_standby_names";

/// How the agent was told to behave towards the server's commits.
#[derive(Clone, Copy, Debug)]
pub struct Manner {
    /// Commits are meant to wait for it: seal at once.
    pub synchronous: bool,
    /// How the server is told what is durable.
    pub acknowledge: Acknowledge,
}

impl From<&WalConfig> for Manner {
    fn from(wal: &WalConfig) -> Self {
        Self {
            synchronous: wal.synchronous,
            acknowledge: wal.acknowledge,
        }
    }
}

/// What the server's setting makes of the agent.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// It is not listed.
    #[default]
    Asynchronous,
    /// It is listed, and `wal.synchronous` says that this is meant.
    Synchronous,
    /// The same, and the list can do without it.
    Dispensable,
    /// It is listed and acknowledges, but nobody told it that commits would wait for it.
    Accidental,
    /// It is listed, but acknowledges nothing on the stream: commits wait for others.
    NotCounted,
}

impl Role {
    /// The role of an agent beside a primary with this list.
    pub fn of(names: &str, manner: Manner) -> Self {
        let list = List::of(names);
        match (list.has(APPLICATION_NAME), manner.acknowledge) {
            (false, _) => Self::Asynchronous,
            (true, Acknowledge::Slot) => Self::NotCounted,
            (true, Acknowledge::Stream) if manner.synchronous => match list.spares_one() {
                true => Self::Dispensable,
                false => Self::Synchronous,
            },
            (true, Acknowledge::Stream) => Self::Accidental,
        }
    }

    /// Whether commits may wait for the agent.
    pub fn is_waited_for(self) -> bool {
        matches!(self, Self::Synchronous | Self::Dispensable | Self::Accidental)
    }

    /// What somebody should know about it; none where everything is as it was meant.
    pub fn remark(self, names: &str) -> Option<String> {
        match self {
            Self::Asynchronous | Self::Synchronous => None,
            Self::Dispensable => Some(format!(
                "{SETTING} = '{names}' lets a commit return when others have confirmed it, and the regions may not have it yet: those \
                 that are listed need not all confirm. For every commit to be in the regions first, list as many names as must \
                 confirm: '{APPLICATION_NAME}', or 'FIRST 2 ({APPLICATION_NAME}, other)'"
            )),
            Self::Accidental => Some(format!(
                "{SETTING} = '{names}' makes this agent a synchronous standby: commits wait until the regions have \
                 them, wal.flush_interval included, and hang while a region that the policy asks for is away. If that is not meant, name the standbys \
                 without \"{APPLICATION_NAME}\" and *, or set acknowledge = \"slot\" in [wal], with which no commit waits for \
                 the agent; if it is, set synchronous = true in [wal]"
            )),
            Self::NotCounted => Some(format!(
                "{SETTING} = '{names}' lists this agent, which does not count (acknowledge = \"slot\" in [wal]): commits wait \
                 for another standby that is listed, and hang while there is none"
            )),
        }
    }
}

/// Shows what the server's list makes of the agent, and says so when that is new.
pub(crate) fn notice(state: &State, manner: Manner, names: &str, standby: bool) {
    // Commits never wait for what streams from a standby.
    let role = if standby {
        Role::Asynchronous
    } else {
        Role::of(names, manner)
    };
    let mut before = Role::default();
    state.update_quietly(|snapshot| before = std::mem::replace(&mut snapshot.synchronous, role));
    if before == role {
        return;
    }
    match role.remark(names) {
        Some(remark) => tracing::warn!("{remark}"),
        None => tracing::info!(role = ?role, names, "what {SETTING} makes of this agent has changed"),
    }
}

/// A value of `synchronous_standby_names`.
#[derive(Debug)]
struct List {
    /// So many of them must confirm a commit.
    needed: usize,
    names: Vec<String>,
}

impl List {
    /// `FIRST 2 (a, b)`, `ANY 2 (a, b)` and `2 (a, b)`: what stands before the list names nobody. Without a number, one is needed.
    fn of(setting: &str) -> Self {
        let mut words = words(setting);
        let open = words.iter().position(|word| *word == Word::Open);
        let listed = words.split_off(open.map_or(0, |place| place + 1));
        let number = words.iter().rev().find_map(|word| match word {
            Word::Name(number) => number.parse().ok(),
            Word::Open => None,
        });
        let name = |word| match word {
            Word::Name(name) => Some(name),
            Word::Open => None,
        };
        Self {
            needed: number.unwrap_or(1),
            names: listed.into_iter().filter_map(name).collect(),
        }
    }

    /// Whether it lists `name`: as the server compares, in any case of letters.
    fn has(&self, name: &str) -> bool {
        let is_it = |listed: &String| listed == "*" || listed.eq_ignore_ascii_case(name);
        self.names.iter().any(is_it)
    }

    /// Whether a commit may return although one that is listed has not confirmed it. Whoever reports no position counts as not there.
    fn spares_one(&self) -> bool {
        self.needed < self.names.len() || self.names.iter().any(|name| name == "*")
    }
}

#[derive(Debug, Eq, PartialEq)]
enum Word {
    Name(String),
    Open,
}

/// The words of the setting, as the server's scanner tells them apart: names may be in double quotes.
fn words(setting: &str) -> Vec<Word> {
    let (mut words, mut rest) = (Vec::new(), setting.chars().peekable());
    while let Some(first) = rest.next() {
        match first {
            '(' => words.push(Word::Open),
            '"' => {
                let mut name = String::new();
                while let Some(next) = rest.next() {
                    // A quote is written as two.
                    if next == '"' && rest.next_if_eq(&'"').is_none() {
                        break;
                    }
                    name.push(next);
                }
                words.push(Word::Name(name));
            }
            ',' | ')' => {}
            space if space.is_whitespace() => {}
            _ => {
                let mut name = String::from(first);
                let ends = |next: &char| next.is_whitespace() || ",()\"".contains(*next);
                while let Some(next) = rest.next_if(|next| !ends(next)) {
                    name.push(next);
                }
                words.push(Word::Name(name));
            }
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_setting_is_read_as_the_server_reads_it() {
        for (setting, listed) in [
            ("", false),
            ("*", true),
            ("highwater", true),
            ("HighWater", true),
            ("\"highwater\"", true),
            ("\"high\"\"water\"", false),
            ("a, highwater , b", true),
            ("FIRST 1 (a, highwater)", true),
            ("any 2 (\"*\", b)", true),
            ("2(a,highwater)", true),
            ("1 (a, b)", false),
            ("first 1 (\"a b\", \"highwater backup\")", false),
            ("highwater_2", false),
            ("\"a, highwater\"", false),
            // A list of its own: nobody is counted, so the words are names.
            ("first, any", false),
        ] {
            assert_eq!(List::of(setting).has(APPLICATION_NAME), listed, "{setting}");
        }
    }

    #[test]
    fn a_list_that_can_do_without_the_agent_is_told_from_one_that_cannot() {
        for (setting, spares) in [
            ("highwater", false),
            ("FIRST 1 (highwater)", false),
            ("any 2 (highwater, a)", false),
            ("2(a, highwater)", false),
            ("highwater, a", true),
            ("FIRST 1 (highwater, a)", true),
            ("ANY 2 (a, highwater, b)", true),
            ("*", true),
            ("FIRST 2 (highwater, *)", true),
        ] {
            let meant = Manner {
                synchronous: true,
                acknowledge: Acknowledge::Stream,
            };
            let role = Role::of(setting, meant);
            assert!(
                role.is_waited_for() && role.remark(setting).is_some() == spares,
                "{setting}"
            );
        }
    }

    #[test]
    fn only_an_accident_and_a_list_that_leads_nowhere_are_remarked_on() {
        let manner = |synchronous, acknowledge| Manner {
            synchronous,
            acknowledge,
        };
        let plain = manner(false, Acknowledge::Stream);
        assert_eq!(Role::of("a", plain), Role::Asynchronous);
        let accident = Role::of("*", plain);
        assert!(accident == Role::Accidental && accident.is_waited_for());
        assert!(accident.remark("*").unwrap().contains("acknowledge = \"slot\""));
        let meant = Role::of("highwater", manner(true, Acknowledge::Stream));
        assert!(meant.is_waited_for() && meant.remark("highwater").is_none());
        let uncounted = Role::of("*", manner(false, Acknowledge::Slot));
        assert!(!uncounted.is_waited_for() && uncounted.remark("*").unwrap().contains("hang"));
    }

    #[test]
    fn it_is_shown_when_it_is_new_and_a_standby_is_never_waited_for() {
        let state = State::new(Vec::new());
        let manner = Manner {
            synchronous: false,
            acknowledge: Acknowledge::Stream,
        };
        for (names, standby, role) in [
            ("", false, Role::Asynchronous),
            ("*", false, Role::Accidental),
            ("*", true, Role::Asynchronous),
        ] {
            notice(&state, manner, names, standby);
            assert_eq!(state.snapshot().synchronous, role, "{names} {standby}");
        }
    }
}
