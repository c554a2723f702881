//! Server-sent events: one `data:` line per chunk, then `data: [DONE]`. An error after the start is an event of its own.

use std::{collections::VecDeque, convert::Infallible};

use axum::response::{
    IntoResponse, Response,
    sse::{Event, Sse},
};
use serde_json::Value;

use crate::choices::{News, Run, Usage};

/// Makes the closing event with the counts.
pub(crate) type UsageChunk = fn(Usage) -> Value;

struct Stream<F> {
    run: Run,
    chunk: F,
    usage: Option<UsageChunk>,
    queue: VecDeque<String>,
    over: bool,
}

/// Streams a run; `chunk` makes the bodies for one piece of news.
pub(crate) fn respond<F>(run: Run, chunk: F, usage: Option<UsageChunk>) -> Response
where
    F: Fn(News) -> Vec<Value> + Send + 'static,
{
    let stream = Stream { run, chunk, usage, queue: VecDeque::new(), over: false };
    let events = futures::stream::unfold(stream, |mut stream| async move {
        stream.fill().await;
        let data = stream.queue.pop_front()?;
        Some((Ok::<_, Infallible>(Event::default().data(data)), stream))
    });
    Sse::new(events).into_response()
}

impl<F: Fn(News) -> Vec<Value>> Stream<F> {
    /// Waits until the queue has an event or the stream is over.
    async fn fill(&mut self) {
        while self.queue.is_empty() && !self.over {
            match self.run.next().await {
                Some(Ok(news)) => self.queue.extend((self.chunk)(news).iter().map(Value::to_string)),
                Some(Err(error)) => {
                    self.queue.push_back(error.body().to_string());
                    self.over = true;
                }
                None => {
                    self.queue.extend(self.usage.map(|usage| usage(self.run.usage).to_string()));
                    self.queue.push_back("[DONE]".to_owned());
                    self.over = true;
                }
            }
        }
    }
}
