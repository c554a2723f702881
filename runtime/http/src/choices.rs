//! Runs the choices of one HTTP request on the engine and turns their tokens into text.
//!
//! The engine's thread only passes tokens on; text is made on the side of the request. **Invariant:** dropping a [`Run`]
//! (a client went away) ends its sequences at their next token.

use axum::http::StatusCode;
use dsv3_data::Tokenizer;
use dsv3_infer::{Finish, Request, Token, Update};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::{
    error::ApiError,
    state::AppState,
    text::{Piece, Transcript},
};

/// One sequence to generate.
pub(crate) struct Job {
    pub(crate) request: Request,
    /// Returns the prompt's text first.
    pub(crate) echo: bool,
    /// Leading prompt tokens that the server added and that have no text.
    pub(crate) silent: usize,
    pub(crate) stops: Vec<String>,
    pub(crate) visible_only: bool,
}

/// What happened to a choice.
#[derive(Debug)]
pub(crate) enum News {
    /// It grew.
    Piece(usize, Piece),
    /// It ended; OpenAI's finish reason.
    End(usize, &'static str),
}

/// Tokens read and written, for `usage`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: usize,
    pub(crate) completion_tokens: usize,
}

impl Usage {
    pub(crate) fn json(self) -> serde_json::Value {
        serde_json::json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        })
    }
}

struct Choice {
    transcript: Transcript,
    engine_id: u64,
    stop_ids: Vec<u32>,
    /// Prompt tokens whose log-probabilities are still to come.
    prompt_left: usize,
    silent: usize,
    ended: bool,
}

/// The running choices of one request.
pub(crate) struct Run {
    state: AppState,
    choices: Vec<Choice>,
    updates: UnboundedReceiver<(usize, Update)>,
    ready: std::collections::VecDeque<News>,
    pub(crate) usage: Usage,
}

impl Run {
    /// Hands every job to the engine.
    pub(crate) fn start(state: &AppState, jobs: Vec<Job>, prompt_tokens: usize) -> Result<Self, ApiError> {
        let (sender, updates) = unbounded_channel();
        let usage = Usage { prompt_tokens, completion_tokens: 0 };
        let mut run = Self { state: state.clone(), choices: Vec::new(), updates, ready: Default::default(), usage };
        for (index, job) in jobs.into_iter().enumerate() {
            run.submit(index, job, &sender)?;
        }
        Ok(run)
    }

    fn submit(&mut self, index: usize, job: Job, sender: &UnboundedSender<(usize, Update)>) -> Result<(), ApiError> {
        let tokenizer = &self.state.served.text.tokenizer;
        let with_logprobs = job.request.echo_from.is_some();
        let transcript = Transcript::new(job.stops, job.visible_only);
        let mut choice = Choice {
            transcript,
            engine_id: 0,
            stop_ids: job.request.stop_ids.clone(),
            prompt_left: if job.echo { job.request.ids.len() } else { 0 },
            silent: job.silent,
            ended: false,
        };
        if job.echo && !with_logprobs {
            let plain = |id: &u32| Token { id: *id, logprob: None, top: Vec::new() };
            let tokens: Vec<Token> = job.request.ids.iter().map(plain).collect();
            self.ready.extend(choice.echo(index, tokenizer, &tokens));
        }
        let sender = sender.clone();
        let sink = Box::new(move |update| sender.send((index, update)).is_ok());
        choice.engine_id = self.state.engine.submit(job.request, sink).map_err(|error| ApiError::engine(&error))?;
        self.choices.push(choice);
        Ok(())
    }

    /// The next piece of news; `None` after the end of the last choice.
    pub(crate) async fn next(&mut self) -> Option<Result<News, ApiError>> {
        loop {
            if let Some(news) = self.ready.pop_front() {
                return Some(Ok(news));
            }
            if self.choices.iter().all(|choice| choice.ended) {
                return None;
            }
            let Some((index, update)) = self.updates.recv().await else {
                return Some(Err(ApiError::stopping()));
            };
            if let Err(error) = self.take(index, update) {
                return Some(Err(error));
            }
        }
    }

    fn take(&mut self, index: usize, update: Update) -> Result<(), ApiError> {
        let tokenizer = &self.state.served.text.tokenizer;
        let choice = &mut self.choices[index];
        if choice.ended {
            return Ok(());
        }
        match update {
            Update::Prompt(tokens) => self.ready.extend(choice.echo(index, tokenizer, &tokens)),
            Update::Tokens(tokens) => {
                for token in tokens {
                    self.usage.completion_tokens += 1;
                    if choice.stop_ids.contains(&token.id) {
                        continue;
                    }
                    let piece = choice.transcript.push(tokenizer, &token);
                    if piece != Piece::default() {
                        self.ready.push_back(News::Piece(index, piece));
                    }
                    if choice.transcript.is_stopped() {
                        choice.ended = true;
                        self.state.engine.cancel(choice.engine_id);
                        self.ready.push_back(News::End(index, "stop"));
                        break;
                    }
                }
            }
            Update::Finished(finish) => {
                choice.ended = true;
                let piece = choice.transcript.finish(tokenizer);
                if piece != Piece::default() {
                    self.ready.push_back(News::Piece(index, piece));
                }
                let stopped = choice.transcript.is_stopped();
                self.ready.push_back(News::End(index, reason(finish, stopped)?));
            }
        }
        Ok(())
    }
}

impl Choice {
    /// Prompt tokens; the prompt's text leaves in one piece when the last one has come.
    fn echo(&mut self, index: usize, tokenizer: &Tokenizer, tokens: &[Token]) -> Option<News> {
        for token in tokens {
            let silent = self.silent > 0;
            self.silent -= usize::from(silent);
            self.transcript.push_prompt(tokenizer, token, silent);
            self.prompt_left = self.prompt_left.saturating_sub(1);
        }
        (self.prompt_left == 0).then(|| News::Piece(index, self.transcript.end_prompt()))
    }
}

fn reason(finish: Finish, stopped: bool) -> Result<&'static str, ApiError> {
    match finish {
        Finish::Stop => Ok("stop"),
        Finish::Length if stopped => Ok("stop"),
        Finish::Length => Ok("length"),
        Finish::Cancelled => Err(ApiError::stopping()),
        Finish::NonFinite { position } => {
            let message = format!("the model's logits at position {position} are not finite");
            Err(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "non_finite_logits", message))
        }
    }
}
