//! One error type that tells the caller what to do.
//!
//! Owns: the kinds and the sentence shown to people (region, operation, key, cause, next step).
//! Does not own: the mapping from S3 or the file system to a kind; that is beside each store.

use std::error::Error;
use std::fmt;
use std::sync::Arc;

/// What the caller can do about a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The store says that there is no such object. Never guessed from a bare HTTP 404.
    NotFound,
    /// May pass by itself: timeouts, connections, throttling, server errors.
    Retry,
    /// Someone must act outside the configuration (grant, credentials, disk space); works afterwards without
    /// a restart.
    Operator,
    /// The configuration is wrong: bucket, region, endpoint, option.
    Config,
    /// The bytes that came back are not the bytes that were stored.
    Corrupt,
    /// Another object, with different content, holds the key.
    Conflict,
    /// A mistake of the program, such as a key no store can hold.
    Bug,
}

impl ErrorKind {
    /// Lower-case name, for metrics labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotFound => "not_found",
            Self::Retry => "retry",
            Self::Operator => "operator",
            Self::Config => "config",
            Self::Corrupt => "corrupt",
            Self::Conflict => "conflict",
            Self::Bug => "bug",
        }
    }

    fn default_next_step(self) -> &'static str {
        match self {
            Self::NotFound => "check the key and the region's prefix",
            Self::Retry => "the same call may work later",
            Self::Operator => "see the store's own log for the reason, then mend it; no restart is needed",
            Self::Config => "correct the region's settings and start again",
            Self::Corrupt => "read the object from another region and run verify",
            Self::Conflict => "compare both objects; nothing was replaced",
            Self::Bug => "report this with the message",
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What was being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Opening the region.
    Open,
    /// Writing an object.
    Put,
    /// Reading an object.
    Get,
    /// Reading a part of an object.
    GetRange,
    /// Asking for an object's size.
    Head,
    /// Listing keys.
    List,
    /// Deleting an object.
    Delete,
}

impl Operation {
    /// Lower-case name, for messages and metrics labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Put => "put",
            Self::Get => "get",
            Self::GetRange => "get_range",
            Self::Head => "head",
            Self::List => "list",
            Self::Delete => "delete",
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A failed storage call. Cheap to clone and to move.
#[derive(Clone)]
pub struct StoreError(Arc<Inner>);

struct Inner {
    kind: ErrorKind,
    region: String,
    operation: Operation,
    key: String,
    message: String,
    next_step: Option<String>,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl StoreError {
    /// An error of `kind`; `key` is the key or prefix concerned, `""` for the region itself.
    pub fn new(
        kind: ErrorKind,
        region: impl Into<String>,
        operation: Operation,
        key: impl Into<String>,
        message: impl Into<String>,
    ) -> Self {
        Self(Arc::new(Inner {
            kind,
            region: region.into(),
            operation,
            key: key.into(),
            message: message.into(),
            next_step: None,
            source: None,
        }))
    }

    pub(crate) fn corrupt(
        region: impl Into<String>,
        operation: Operation,
        key: impl Into<String>,
        message: impl Into<String>,
    ) -> Self {
        Self::new(ErrorKind::Corrupt, region, operation, key, message)
    }

    /// Says what to do, in place of the kind's general advice. To be called before the error is cloned.
    #[must_use]
    pub fn with_next_step(self, next_step: impl Into<String>) -> Self {
        self.map(|inner| inner.next_step = Some(next_step.into()))
    }

    /// Names the place in the message, for failures that are mended there.
    #[must_use]
    pub(crate) fn at(self, place: &str) -> Self {
        self.map(|inner| inner.message = format!("{} ({place})", inner.message))
    }

    /// Keeps the cause. To be called before the error is cloned.
    #[must_use]
    pub fn with_source(self, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        self.map(|inner| inner.source = Some(source.into()))
    }

    fn map(mut self, change: impl FnOnce(&mut Inner)) -> Self {
        if let Some(inner) = Arc::get_mut(&mut self.0) {
            change(inner);
        }
        self
    }

    /// What the caller can do.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The region's name in the configuration.
    pub fn region(&self) -> &str {
        &self.0.region
    }

    /// What was being done.
    pub fn operation(&self) -> Operation {
        self.0.operation
    }

    /// The key or prefix concerned; empty when the region itself is.
    pub fn key(&self) -> &str {
        &self.0.key
    }

    /// What went wrong, without region, key and advice.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// What to do next.
    pub fn next_step(&self) -> &str {
        self.0
            .next_step
            .as_deref()
            .unwrap_or_else(|| self.0.kind.default_next_step())
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &self.0;
        write!(f, "region {}: {}", inner.region, inner.operation)?;
        if !inner.key.is_empty() {
            write!(f, " {}", inner.key)?;
        }
        write!(f, ": {} ({})", inner.message, self.next_step())
    }
}

impl fmt::Debug for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreError")
            .field("kind", &self.0.kind)
            .field("text", &self.to_string())
            .field("source", &self.0.source)
            .finish()
    }
}

impl Error for StoreError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.0
            .source
            .as_deref()
            .map(|source| source as &(dyn Error + 'static))
    }
}
