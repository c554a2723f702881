//! Arithmetic: problems of three operations on one-digit numbers, their working and their wording.
//!
//! Every change is a sentence of four tokens and every working step is four tokens, so operands sit at a constant distance
//! from where they are used. Running values stay within 0 to 19, each of which is one token.

use dsv3_core::{Rng, mix64};

use super::choose;

const NAMES: [&str; 30] = [
    "Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivan", "June", "Kai", "Lena", "Max", "Nora", "Omar",
    "Pia", "Quinn", "Rosa", "Sam", "Tess", "Uma", "Vera", "Will", "Xena", "Yuri", "Zoe", "Amir", "Bella", "Carl",
    "Dora",
];
const ITEMS: [&str; 16] = [
    "apples", "pens", "coins", "books", "cards", "shells", "stamps", "eggs", "keys", "maps", "cups", "hats", "nuts",
    "balls", "toys", "rings",
];
const GAIN: [&str; 5] = ["Buys", "Gets", "Finds", "Wins", "Makes"];
const LOSS: [&str; 5] = ["Sells", "Loses", "Drops", "Eats", "Gives"];

/// Largest running value.
const VALUE_MAX: i64 = 19;

/// `start`, then three signed changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// 1 to 9.
    pub start: i64,
    /// Each 1 to 9 or -1 to -9.
    pub changes: [i64; 3],
}

impl Problem {
    /// Draws one of the held-out problems, or one of the others.
    pub fn draw(rng: &mut Rng, held_out: bool) -> Self {
        loop {
            let start = 1 + rng.below(9) as i64;
            let changes = [0; 3].map(|_| (1 + rng.below(9) as i64) * if rng.below(2) == 0 { 1 } else { -1 });
            let problem = Self { start, changes };
            let inside = problem.values().iter().all(|value| (0..=VALUE_MAX).contains(value));
            if inside && problem.held_out() == held_out {
                return problem;
            }
        }
    }

    /// One problem in five, by a hash of the whole tuple, is in no training text of any stage.
    pub fn held_out(&self) -> bool {
        let mix = |hash: u64, number: &i64| mix64(hash ^ (number + 64) as u64);
        let hash = self.changes.iter().fold(mix(0x9E37, &self.start), mix);
        hash % 5 == 0
    }

    /// Start and running values.
    pub fn values(&self) -> [i64; 4] {
        let mut values = [self.start; 4];
        for (i, change) in self.changes.iter().enumerate() {
            values[i + 1] = values[i] + change;
        }
        values
    }

    /// The final value.
    pub fn answer(&self) -> i64 {
        self.values()[3]
    }

    /// The working: ` 6 + 8 = 14 + 1 = 15 + 2 = 17`.
    pub fn working(&self) -> String {
        self.working_with(&self.values())
    }

    /// The working with running values of somebody who may have slipped.
    pub fn working_with(&self, values: &[i64; 4]) -> String {
        let steps: String = (0..3).map(|i| self.step(i, values)).collect();
        format!(" {}{steps}", self.start)
    }

    /// Step `i` of the working: ` + 8 = 14`.
    pub fn step(&self, i: usize, values: &[i64; 4]) -> String {
        let sign = if self.changes[i] > 0 { '+' } else { '-' };
        format!(" {sign} {} = {}", self.changes[i].abs(), values[i + 1])
    }

    /// In words: `Sam has 6 shells. Buys 6 shells. Gives 4 shells. Wins 3 shells. Total?`
    pub fn question(&self, rng: &mut Rng) -> String {
        let (name, item) = (choose(rng, &NAMES), choose(rng, &ITEMS));
        let mut text = format!("{name} has {} {item}.", self.start);
        for change in self.changes {
            let verb = choose(rng, if change > 0 { &GAIN } else { &LOSS });
            text += &format!(" {verb} {} {item}.", change.abs());
        }
        text + " Total?"
    }
}

/// Eight lines of working.
pub fn facts_document(rng: &mut Rng, held_out: bool) -> String {
    let lines: Vec<String> = (0..8).map(|_| Problem::draw(rng, held_out).working()).collect();
    lines.join("\n")
}

/// Three problems with their answers, three in four of them worked.
pub fn problems_document(rng: &mut Rng, held_out: bool) -> String {
    let mut lines = Vec::new();
    for _ in 0..3 {
        let problem = Problem::draw(rng, held_out);
        let (question, answer) = (problem.question(rng), problem.answer());
        let worked = rng.uniform() < 0.75;
        let thought = if worked { format!(" Think:{}.", problem.working()) } else { String::new() };
        lines.push(format!("{question}{thought} Answer {answer}"));
    }
    lines.join("\n")
}

/// The short response: no thought, only the answer.
pub fn direct_response(problem: &Problem) -> String {
    format!("<think></think>\n#### {}", problem.answer())
}

/// The response of a reasoning teacher: the working, then the last step checked again. A slip changes one running value by
/// one and is carried to the end.
pub fn reasoned_response(problem: &Problem, rng: &mut Rng, slip_share: f64) -> String {
    let mut values = problem.values();
    if rng.uniform() < slip_share {
        let first = 1 + rng.below(3) as usize;
        let later = &values[first..];
        let may_fall = later.iter().all(|value| *value > 0);
        let must_fall = later.contains(&VALUE_MAX);
        let down = may_fall && (must_fall || rng.below(2) == 0);
        values[first..].iter_mut().for_each(|value| *value += if down { -1 } else { 1 });
    }
    let check = problem.step(2, &values);
    let working = problem.working_with(&values);
    format!("<think>{working}. Check: {}{check}.</think>\n#### {}", values[2], values[3])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_problem_in_five_is_held_out() {
        let mut counts = [0; 2];
        let digits = || (1..=9).flat_map(|n| [n, -n]);
        for start in 1..=9 {
            for a in digits() {
                for b in digits() {
                    for c in digits() {
                        let problem = Problem { start, changes: [a, b, c] };
                        if problem.values().iter().all(|v| (0..=VALUE_MAX).contains(v)) {
                            counts[usize::from(problem.held_out())] += 1;
                        }
                    }
                }
            }
        }
        let share = f64::from(counts[1]) / f64::from(counts[0] + counts[1]);
        assert!(counts[0] + counts[1] > 20_000 && (share - 0.2).abs() < 0.02, "{counts:?}");
    }

    #[test]
    fn wording_and_working_are_those_of_the_recipe() {
        let problem = Problem { start: 6, changes: [6, -4, 3] };
        assert_eq!(problem.working(), " 6 + 6 = 12 - 4 = 8 + 3 = 11");
        assert_eq!(direct_response(&problem), "<think></think>\n#### 11");
        let right = reasoned_response(&problem, &mut Rng::new(1), 0.0);
        assert_eq!(right, "<think> 6 + 6 = 12 - 4 = 8 + 3 = 11. Check: 8 + 3 = 11.</think>\n#### 11");
        let mut rng = Rng::new(2);
        assert!((0..50).all(|_| !reasoned_response(&problem, &mut rng, 1.0).ends_with("#### 11")));
        let question = problem.question(&mut rng);
        assert_eq!(question.matches('.').count(), 4);
        assert!(question.ends_with(" Total?"), "{question}");
    }
}
