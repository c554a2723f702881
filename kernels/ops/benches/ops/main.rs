//! Times every op of `kernels/README.md`, forward and backward, at the shapes of `demo`, `S` and `M` (decoding: `L`), beside
//! what the machine reaches in a large f32 product or in a large read or copy, measured in the same run.
//!
//! ```text
//! cargo bench -p dsv3-ops --bench ops [-- [FILTER..] [--markdown] [--isa NAME] [--seconds X] [--save FILE] [--before FILE]]
//! ```
//!
//! FILTER is a part of `op shape pass`, as they are printed; rows that hold any are measured. `--save` keeps the times, and
//! `--before` sets kept ones beside the new ones. `RAYON_NUM_THREADS=1` measures one core. A time is the best of several
//! runs, `--seconds` together at least.

mod attention;
mod block;
mod harness;
mod products;
mod shapes;

use harness::Bench;

fn main() {
    let mut bench = Bench::new();
    for shape in &shapes::ALL {
        products::linear(&mut bench, shape);
        products::experts(&mut bench, shape);
        attention::training(&mut bench, shape);
        block::norm_and_mlp(&mut bench, shape);
        block::routing(&mut bench, shape);
        block::ends(&mut bench, shape);
        products::quantisers(&mut bench, shape);
    }
    products::decoding(&mut bench);
    attention::decoding(&mut bench);
    bench.finish();
}
