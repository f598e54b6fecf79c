//! Exit codes that both programs share: one meaning per number, so that a script can act on it.

use std::process::ExitCode;

/// How a command ended. `wal-fetch` alone does not use these: PostgreSQL gives its own meaning to
/// the exit code of `restore_command`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Exit {
    /// What was asked for is done.
    Done = 0,
    /// The answer is no: not ready, target unreachable, recovery point breached, damage found.
    No = 1,
    /// The command line or the configuration is wrong; nothing was tried.
    Usage = 2,
    /// Storage or database trouble that a retry may cure.
    Trouble = 3,
    /// Damage or conflict in the archive: a retry will not help.
    Damage = 4,
}

impl Exit {
    /// The number given to the operating system.
    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

#[cfg(test)]
mod tests {
    use super::Exit;

    #[test]
    fn codes_are_the_documented_ones() {
        let codes = [Exit::Done, Exit::No, Exit::Usage, Exit::Trouble, Exit::Damage].map(Exit::code);
        assert_eq!(codes, [0, 1, 2, 3, 4]);
    }
}
