//! Supervised fine-tuning data: conversations as token rows with the loss on the assistant's tokens only.
//!
//! Rows of a step lie one after another with their boundaries as spans, so attention, positions and the balance loss
//! never cross from one sample into another and nothing is padded. Sample `cursor` of the run is element
//! permute(cursor mod n) of epoch cursor / n. Report §5.1: samples packed with masks that isolate them.

use dsv3_core::{Error as CoreError, mix64, permute_index};
use dsv3_data::{ChatExample, ChatTemplate, Message, Tokenizer};
use dsv3_model::Batch;
use dsv3_train::{MicroBatch, Request, Source, StepData, next_positions};

use crate::error::{Error, Result};

/// Conversations as tokens.
#[derive(Clone, Debug, Default)]
pub struct Examples {
    /// Those that fit.
    pub examples: Vec<ChatExample>,
    /// How many were left out for having more than the allowed tokens.
    pub too_long: usize,
    /// How many were left out for having no token of an assistant.
    pub without_answer: usize,
}

impl Examples {
    /// Tokens of all examples.
    pub fn tokens(&self) -> usize {
        self.examples.iter().map(|example| example.ids.len()).sum()
    }

    /// Tokens that carry loss.
    pub fn assistant_tokens(&self) -> usize {
        self.examples.iter().map(|example| example.assistant.iter().filter(|on| **on).count()).sum()
    }
}

/// Turns conversations into tokens by the chat template; those of more than `tokens_max` are left out and counted.
///
/// # Errors
/// When the template or the tokenizer refuses a conversation, or none is left.
pub fn encode<'a>(
    conversations: impl IntoIterator<Item = (String, &'a [Message])>,
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    tokens_max: usize,
) -> Result<Examples> {
    let mut out = Examples::default();
    for (record, messages) in conversations {
        let example = template.encode_example(tokenizer, messages);
        let example = example.map_err(|source| Error::Encode { record, source: Box::new(source) })?;
        if example.ids.len() > tokens_max {
            out.too_long += 1;
        } else if !example.assistant.iter().skip(1).any(|on| *on) {
            out.without_answer += 1;
        } else {
            out.examples.push(example);
        }
    }
    if out.examples.is_empty() {
        let (long, silent) = (out.too_long, out.without_answer);
        let what =
            format!("no conversation is left: {long} have more than {tokens_max} tokens, {silent} have no answer");
        return Err(Error::Empty { what });
    }
    Ok(out)
}

/// Examples as a [`Source`].
pub struct ChatSource {
    examples: Vec<ChatExample>,
    validation: Vec<ChatExample>,
    seed: u64,
    end: u64,
    micro_batch_tokens: usize,
}

impl ChatSource {
    /// `epochs` passes over `examples`, in an order by `seed`.
    pub fn new(examples: Vec<ChatExample>, epochs: u64, seed: u64, micro_batch_tokens: usize) -> Self {
        let end = examples.len() as u64 * epochs;
        Self { examples, validation: Vec::new(), seed, end, micro_batch_tokens }
    }

    /// Examples to validate on, which are not trained on.
    #[must_use]
    pub fn with_validation(mut self, validation: Vec<ChatExample>) -> Self {
        self.validation = validation;
        self
    }

    /// Steps of `sequences` samples until the data ends.
    pub fn steps(&self, sequences: u64) -> u64 {
        self.end.div_ceil(sequences.max(1))
    }

    fn example(&self, position: u64) -> &ChatExample {
        let count = self.examples.len() as u64;
        let key = mix64(mix64(self.seed) ^ mix64(position / count));
        &self.examples[permute_index(position % count, count, key) as usize]
    }
}

impl Source for ChatSource {
    fn next(&mut self, request: Request<'_>) -> Result<Option<StepData>, CoreError> {
        let (positions, cursor) = next_positions(request.cursor, request.sequences, self.end, request.excluded);
        if positions.is_empty() {
            return Ok(None);
        }
        let rows: Vec<&ChatExample> = positions.iter().map(|position| self.example(*position)).collect();
        Ok(Some(StepData { micro_batches: pack(&rows, self.micro_batch_tokens), cursor }))
    }

    fn validation(&mut self) -> Result<Vec<MicroBatch>, CoreError> {
        Ok(pack(&self.validation.iter().collect::<Vec<_>>(), self.micro_batch_tokens))
    }
}

/// Micro-batches of at most `tokens` inputs (or one example).
fn pack(rows: &[&ChatExample], tokens: usize) -> Vec<MicroBatch> {
    split(rows, tokens, |example| example.ids.len())
        .map(|rows| Batch::from_masked_rows(rows.iter().map(|row| (&row.ids[..], &row.assistant[..]))).into())
        .collect()
}

/// Cuts `rows` into runs whose lengths add up to at most `limit`, or of one row.
pub(crate) fn split<'a, T>(
    rows: &'a [T],
    limit: usize,
    len: impl Fn(&T) -> usize + 'a,
) -> impl Iterator<Item = &'a [T]> + 'a {
    let mut rest = rows;
    std::iter::from_fn(move || {
        let mut held = 0;
        let fits = |row: &&T| {
            held += len(row);
            held <= limit
        };
        let count = rest.iter().take_while(fits).count().max(1).min(rest.len());
        let (run, after) = rest.split_at(count);
        rest = after;
        (!run.is_empty()).then_some(run)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(len: u32) -> ChatExample {
        ChatExample { ids: (0..len).collect(), assistant: (0..len).map(|i| i >= len / 2).collect() }
    }

    #[test]
    fn splits_by_length_and_keeps_order() {
        let runs: Vec<Vec<usize>> = split(&[3, 3, 9, 1, 1, 1], 6, |n| *n).map(<[usize]>::to_vec).collect();
        assert_eq!(runs, [vec![3, 3], vec![9], vec![1, 1, 1]]);
        assert_eq!(split(&[] as &[usize], 6, |n| *n).count(), 0);
    }

    #[test]
    fn epochs_visit_every_example_once_with_loss_on_the_answer_alone() {
        let examples: Vec<ChatExample> = (4..10).map(example).collect();
        let mut source = ChatSource::new(examples, 2, 5, 1000);
        assert_eq!(source.steps(4), 3);
        let (mut cursor, mut lens) = (0, Vec::new());
        while let Some(data) = source.next(Request { cursor, sequences: 4, excluded: &[] }).unwrap() {
            let batch = &data.micro_batches[0].batch;
            lens.extend(batch.spans.iter().map(|span| span.len() + 1));
            let row = batch.spans.range(0);
            let len = row.len() + 1;
            let wanted = batch.targets[row].iter().filter(|target| **target != Batch::NO_TARGET).count();
            assert_eq!(wanted, len - len / 2);
            cursor = data.cursor;
        }
        let (mut first, mut second) = (lens[..6].to_vec(), lens[6..].to_vec());
        assert_ne!(first, second);
        first.sort_unstable();
        second.sort_unstable();
        assert_eq!((&first, &first), (&second, &(4..10).collect::<Vec<_>>()));
    }
}
