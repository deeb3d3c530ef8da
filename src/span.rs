//! Spans at the level of debug, which cost next to nothing where nobody listens.

use tracing::Span;
use tracing::level_filters::LevelFilter;

/// A span, or nothing: a pointer, since it is moved with every request and every guard, and there is seldom one.
#[derive(Debug, Default)]
pub(crate) struct DebugSpan(Option<Box<Span>>);

impl DebugSpan {
    /// What is made, if anybody listens at that level at all.
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
