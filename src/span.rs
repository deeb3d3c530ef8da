//! Debug-level spans that cost next to nothing when no subscriber is interested, and that a
//! subscriber's panic does not unwind from.

use std::future::poll_fn;
use std::pin::pin;

use tracing::Span;
use tracing::level_filters::LevelFilter;

use crate::foreign::SUBSCRIBER;

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
        let mut span = Span::none();
        SUBSCRIBER.call(|| span = make());
        Self((!span.is_none()).then(|| Box::new(span)))
    }

    #[inline]
    pub(crate) fn in_scope<T>(&self, body: impl FnOnce() -> T) -> T {
        match &self.0 {
            Some(span) => within(span, body),
            None => body(),
        }
    }

    /// Runs a future in the span.
    pub(crate) async fn around<F: Future>(self, body: F) -> F::Output {
        let mut body = pin!(body);
        poll_fn(|cx| self.in_scope(|| body.as_mut().poll(cx))).await
    }
}

fn within<T>(span: &Span, body: impl FnOnce() -> T) -> T {
    let mut entered = None;
    SUBSCRIBER.call(|| entered = Some(span.enter()));
    let result = body();
    SUBSCRIBER.call(|| drop(entered));
    result
}

impl Drop for DebugSpan {
    fn drop(&mut self) {
        if let Some(span) = self.0.take() {
            SUBSCRIBER.call(|| drop(span));
        }
    }
}
