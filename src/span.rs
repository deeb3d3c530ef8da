//! Debug-level spans that cost next to nothing when no subscriber is interested.

use tracing::Span;
use tracing::level_filters::LevelFilter;

/// An optional span. Boxed, because it is moved with every request and every guard, and is rarely
/// present.
#[derive(Debug, Default)]
pub(crate) struct DebugSpan(Option<Box<Span>>);

impl DebugSpan {
    /// Creates the span if any subscriber is interested in debug level.
    #[inline]
    pub(crate) fn open(make: impl FnOnce() -> Span) -> Self {
        if LevelFilter::current() < LevelFilter::DEBUG {
            return Self::default();
        }
        let span = make();
        Self((!span.is_none()).then(|| Box::new(span)))
    }

    #[inline]
    pub(crate) fn in_scope<T>(&self, body: impl FnOnce() -> T) -> T {
        match &self.0 {
            Some(span) => span.in_scope(body),
            None => body(),
        }
    }
}
