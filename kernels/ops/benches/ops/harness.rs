//! What the benches of ops and of the optimiser share: arguments, the best of several runs, rates and their ratio to a
//! ceiling, and the tables.
//!
//! An op that multiplies matrices is rated in GFLOP/s of its model (recomputation does not count) against the large f32
//! product; any other in GB/s of the bytes it cannot avoid against the larger of a large read and a large copy. Where
//! those bytes lie in the caches, a fraction may pass 1. Ceilings are measured before and after all rows; the larger count.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Instant;

use dsv3_ops::{Tape, Tensor, Var, WeightGrads};

#[path = "../../../../runtime/cli/bench/ceiling.rs"]
mod ceiling;

/// Least runs of a row.
const RUNS_MIN: usize = 3;

/// What one run of a row does, at least.
#[derive(Clone, Copy)]
pub(crate) enum Amount {
    /// Operations, a multiply-add counting twice.
    Flops(f64),
    /// Bytes read and written.
    Bytes(f64),
}

use Amount::{Bytes, Flops};

/// A measured line: op, shape, pass, seconds of the best run.
struct Row {
    op: String,
    shape: String,
    pass: &'static str,
    amount: Amount,
    seconds: f64,
}

impl Row {
    fn key(&self) -> String {
        format!("{}\t{}\t{}", self.op, self.shape, self.pass)
    }
}

/// Measured rows and how they are wanted.
pub(crate) struct Bench {
    filters: Vec<String>,
    markdown: bool,
    save: Option<PathBuf>,
    /// Microseconds of earlier rows, by key.
    before: Option<BTreeMap<String, f64>>,
    seconds_min: f64,
    machine: (ceiling::Products, ceiling::Memory),
    rows: Vec<Row>,
}

impl Bench {
    /// Reads the arguments of the process and measures the ceilings.
    pub(crate) fn new() -> Self {
        let (mut filters, mut markdown, mut save, mut before, mut seconds_min) = (Vec::new(), false, None, None, 0.06);
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            let mut value = || args.next().unwrap_or_else(|| stop(&format!("{arg} needs a value")));
            match arg.as_str() {
                // Cargo says so.
                "--bench" => {}
                "--markdown" => markdown = true,
                "--isa" => {
                    dsv3_ops::limit_instruction_set(&value()).unwrap_or_else(|error| stop(&error.to_string()));
                }
                "--seconds" => {
                    seconds_min = value().parse().unwrap_or_else(|_| stop("--seconds takes a number"));
                }
                "--save" => save = Some(PathBuf::from(value())),
                "--before" => before = Some(read(&value())),
                option if option.starts_with('-') => stop(&format!("no option {option}")),
                _ => filters.push(arg),
            }
        }
        dsv3_ops::keep_freed_memory();
        let machine = (ceiling::products(), ceiling::memory());
        Self { filters, markdown, save, before, seconds_min, machine, rows: Vec::new() }
    }

    /// Whether one of these rows is asked for.
    pub(crate) fn wants(&self, op: &str, shape: &str, passes: &[&str]) -> bool {
        let name = |pass: &&str| format!("{op} {shape} {pass}");
        let names: Vec<String> = passes.iter().map(name).collect();
        self.filters.is_empty() || self.filters.iter().any(|part| names.iter().any(|name| name.contains(part)))
    }

    /// Times `work`.
    pub(crate) fn time(&mut self, op: &str, shape: &str, pass: &'static str, amount: Amount, mut work: impl FnMut()) {
        self.time_parts(op, shape, [(pass, amount)], || {
            let start = Instant::now();
            work();
            [start.elapsed().as_secs_f64()]
        });
    }

    /// Times the backward pass of what `record` puts on a tape: as a whole, or gradients of inputs, then those of weights.
    pub(crate) fn backward<const N: usize>(
        &mut self,
        op: &str,
        shape: &str,
        passes: [(&'static str, Amount); N],
        record: impl Fn(&mut Tape) -> Var,
    ) {
        let (mut weights, mut seed) = (WeightGrads::default(), None);
        self.time_parts(op, shape, passes, || {
            let mut tape = Tape::new();
            let out = record(&mut tape);
            let seed = seed.get_or_insert_with(|| dsv3_ops::testing::values(out.value.shape(), 99));
            let seeds: Vec<(_, Tensor)> = vec![(out.id(), seed.clone())];
            let mut seconds = [0.0; N];
            let start = Instant::now();
            let grads = tape.backward_inputs(seeds);
            seconds[0] += start.elapsed().as_secs_f64();
            let start = Instant::now();
            tape.run_deferred(usize::MAX, &mut weights);
            seconds[N - 1] += start.elapsed().as_secs_f64();
            drop(grads);
            seconds
        });
    }

    /// Repeats `work`, which says how long its parts took.
    pub(crate) fn time_parts<const N: usize>(
        &mut self,
        op: &str,
        shape: &str,
        passes: [(&'static str, Amount); N],
        mut work: impl FnMut() -> [f64; N],
    ) {
        if !self.wants(op, shape, &passes.map(|(pass, _)| pass)) {
            return;
        }
        let (mut best, mut runs, mut sum) = ([f64::INFINITY; N], 0, 0.0);
        while runs < RUNS_MIN || sum < self.seconds_min {
            let seconds = work();
            best = std::array::from_fn(|i| best[i].min(seconds[i]));
            (runs, sum) = (runs + 1, sum + seconds.iter().sum::<f64>());
        }
        for ((pass, amount), seconds) in passes.into_iter().zip(best) {
            if std::io::stderr().is_terminal() {
                eprint!("\r{:>4} rows", self.rows.len() + 1);
            }
            self.rows.push(Row { op: op.to_owned(), shape: shape.to_owned(), pass, amount, seconds });
        }
    }

    /// Measures the ceilings again and prints the table.
    pub(crate) fn finish(mut self) {
        dsv3_ops::return_freed_memory();
        self.machine.0 = self.machine.0.max(ceiling::products());
        self.machine.1 = self.machine.1.max(ceiling::memory());
        let (products, memory) = self.machine;
        if std::io::stderr().is_terminal() {
            eprint!("\r");
        }
        println!(
            "{}, {}, {} threads; large f32 product: gemm crate {:.1}, ours {:.1} GFLOP/s; memory: read {:.1}, copy {:.1} GB/s\n",
            processor(),
            dsv3_ops::instruction_set(),
            rayon::current_num_threads(),
            products.gemm,
            products.own,
            memory.read,
            memory.copy,
        );
        let cells: Vec<Vec<String>> = self.rows.iter().map(|row| self.cells(row)).collect();
        print_table(&self.heading(), &cells, self.markdown);
        if let Some(path) = &self.save {
            let line = |row: &Row| format!("{}\t{}\n", row.key(), 1e6 * row.seconds);
            let text: String = self.rows.iter().map(line).collect();
            std::fs::write(path, text).unwrap_or_else(|error| stop(&format!("{}: {error}", path.display())));
        }
    }

    fn heading(&self) -> Vec<&'static str> {
        let mut heading = vec!["Op", "Shape", "Pass"];
        heading.extend(self.before.as_ref().map(|_| "Before (us)"));
        heading.extend(["Time (us)", "Rate", "Ceiling", "Fraction"]);
        heading
    }

    fn cells(&self, row: &Row) -> Vec<String> {
        let (amount, ceiling, unit) = match row.amount {
            Flops(count) => (count, self.machine.0.ceiling(), "GFLOP/s"),
            Bytes(count) => (count, self.machine.1.bandwidth(), "GB/s"),
        };
        let rate = amount / row.seconds * 1e-9;
        let micros = |us: f64| if us < 100.0 { format!("{us:.1}") } else { format!("{us:.0}") };
        let mut cells = vec![row.op.clone(), row.shape.clone(), row.pass.to_owned()];
        cells.extend(self.before.as_ref().map(|before| before.get(&row.key()).map_or(String::new(), |us| micros(*us))));
        cells.push(micros(1e6 * row.seconds));
        cells.push(format!("{rate:.1} {unit}"));
        cells.push(format!("{ceiling:.0}"));
        cells.push(format!("{:.2}", rate / ceiling));
        cells
    }
}

fn print_table(heading: &[&str], rows: &[Vec<String>], markdown: bool) {
    if markdown {
        println!("| {} |\n|{}", heading.join(" | "), "---|".repeat(heading.len()));
        for row in rows {
            println!("| {} |", row.join(" | "));
        }
        return;
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = heading.iter().enumerate().map(|(i, name)| width(i).max(name.len())).collect();
    let line = |cells: &[String]| {
        let padded = cells
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(i, (cell, width))| if i < 3 { format!("{cell:<width$}") } else { format!("{cell:>width$}") });
        println!("{}", padded.collect::<Vec<_>>().join("  "));
    };
    line(&heading.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
    rows.iter().for_each(|row| line(row));
}

/// Rows kept by `--save`.
fn read(path: &str) -> BTreeMap<String, f64> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| stop(&format!("{path}: {error}")));
    let line = |line: &str| {
        let (key, us) = line.rsplit_once('\t')?;
        Some((key.to_owned(), us.parse().ok()?))
    };
    text.lines().map(|text| line(text).unwrap_or_else(|| stop(&format!("{path}: not a row: {text}")))).collect()
}

/// Name of the processor, where the system says it.
fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name"));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |name| name.trim_start_matches([' ', '\t', ':']).to_owned())
}

fn stop(reason: &str) -> ! {
    eprintln!("{reason}");
    std::process::exit(64)
}
