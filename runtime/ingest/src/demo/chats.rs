//! Problems as prompts: for SFT, for a teacher's traces, for reinforcement learning, for evaluation.

use dsv3_core::Rng;

use super::{
    problems::{Problem, direct_response, reasoned_response},
    real::RealText,
    table::{Column, Table},
};

/// Responses that the teacher gives to each problem.
const TRIES: usize = 4;
/// Share of the teacher's responses with a slip.
const SLIP_SHARE: f64 = 0.3;
/// Name under which a reward judges these prompts.
const TASK: &str = "arithmetic";

/// A problem in words.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The problem.
    pub problem: Problem,
    /// Its wording.
    pub question: String,
}

/// Draws `count` problems, all held out or none.
pub fn problems(rng: Rng, count: usize, held_out: bool) -> Vec<Asked> {
    let one = |index: usize| {
        let mut rng = rng.key(index);
        let problem = Problem::draw(&mut rng, held_out);
        Asked { problem, question: problem.question(&mut rng) }
    };
    (0..count).map(one).collect()
}

fn texts(asked: &[Asked], text: impl Fn(&Asked) -> String) -> Column {
    Column::Text(asked.iter().map(text).collect())
}

fn answer(asked: &Asked) -> String {
    asked.problem.answer().to_string()
}

/// `prompt`, `answer`, `task` and, if asked for, `solution`, the direct response.
pub fn prompt_table(asked: &[Asked], with_solution: bool) -> Table {
    let mut columns = vec![("prompt", texts(asked, |a| a.question.clone())), ("answer", texts(asked, answer))];
    if with_solution {
        columns.push(("solution", texts(asked, |a| direct_response(&a.problem))));
    }
    columns.push(("task", texts(asked, |_| TASK.to_owned())));
    Table::new(columns)
}

/// `question`, `answer`, `task`.
pub fn question_table(asked: &[Asked]) -> Table {
    Table::new(vec![
        ("question", texts(asked, |a| a.question.clone())),
        ("answer", texts(asked, answer)),
        ("task", texts(asked, |_| TASK.to_owned())),
    ])
}

/// Teacher's traces in the columns of the public R1 sets. About three in ten of the generations end wrong; the column that
/// would say which is left out, since rejecting them is the pipeline's work.
pub fn trace_table(asked: &[Asked], rng: Rng) -> Table {
    let generations = asked.iter().enumerate().map(|(index, one)| {
        let mut rng = rng.key(index);
        (0..TRIES).map(|_| reasoned_response(&one.problem, &mut rng, SLIP_SHARE)).collect()
    });
    let uuids = (0..asked.len()).map(|index| format!("demo-{index:05}")).collect();
    Table::new(vec![
        ("problem", texts(asked, |a| a.question.clone())),
        ("solution", texts(asked, |a| direct_response(&a.problem))),
        ("answer", texts(asked, answer)),
        ("problem_type", texts(asked, |_| TASK.to_owned())),
        ("source", texts(asked, |_| "dsv3-pipeline generate".to_owned())),
        ("uuid", Column::Text(uuids)),
        ("generations", Column::Texts(generations.collect())),
    ])
}

/// `count` questions of GSM8K's test set with the right final answer among those of three other questions, in MMLU's columns.
pub fn choice_table(real: &RealText, mut rng: Rng, count: usize) -> Table {
    let test = &real.gsm8k_test;
    let mut order: Vec<usize> = (0..test.len()).collect();
    rng.shuffle(&mut order);
    let (mut questions, mut choices, mut answers) = (Vec::new(), Vec::new(), Vec::new());
    for index in order.into_iter().take(count) {
        let right = test[index].final_answer().to_owned();
        let mut offered = vec![right.clone()];
        while offered.len() < 4 {
            let other = test[rng.below(test.len() as u64) as usize].final_answer().to_owned();
            if !offered.contains(&other) {
                offered.push(other);
            }
        }
        rng.shuffle(&mut offered);
        answers.push(offered.iter().position(|choice| *choice == right).unwrap_or(0) as i64);
        questions.push(test[index].question.clone());
        choices.push(offered);
    }
    let subjects = vec!["gsm8k".to_owned(); questions.len()];
    Table::new(vec![
        ("question", Column::Text(questions)),
        ("subject", Column::Text(subjects)),
        ("choices", Column::Texts(choices)),
        ("answer", Column::Integer(answers)),
    ])
}
