//! Counter-based randomness: every draw is a pure function of (seed, labels, counter), never of a saved stream, so any
//! step can be replayed alone and results do not depend on threads or interruptions.

/// Mixes 64 bits (the finaliser of SplitMix64).
pub fn mix64(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Draws keyed by a seed and labels.
///
/// ```
/// use dsv3_core::Rng;
/// let mut a = Rng::new(7).key("init").key(3);
/// let mut b = Rng::new(7).key("init").key(3);
/// assert_eq!(a.next_u64(), b.next_u64());
/// ```
#[derive(Clone, Debug)]
pub struct Rng {
    key: u64,
    counter: u64,
}

/// Something a random stream can be keyed by.
pub trait Label {
    /// 64 bits that name it.
    fn bits(self) -> u64;
}

impl Label for u64 {
    fn bits(self) -> u64 {
        self
    }
}

impl Label for i32 {
    fn bits(self) -> u64 {
        self as u64
    }
}

impl Label for usize {
    fn bits(self) -> u64 {
        self as u64
    }
}

impl Label for &str {
    fn bits(self) -> u64 {
        self.bytes().fold(0xCBF2_9CE4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01B3))
    }
}

impl Rng {
    /// The root stream of `seed`.
    pub fn new(seed: u64) -> Self {
        Self { key: mix64(seed), counter: 0 }
    }

    /// The sub-stream named by `label`, from its start.
    #[must_use]
    pub fn key(&self, label: impl Label) -> Self {
        Self { key: mix64(self.key ^ mix64(label.bits())), counter: 0 }
    }

    /// 64 uniform bits.
    pub fn next_u64(&mut self) -> u64 {
        self.counter += 1;
        mix64(self.key ^ mix64(self.counter))
    }

    /// Uniform in [0, 1), 53 bits.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in 0..n (0 when n is 0). Multiply-shift: its bias is below n / 2^64.
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next_u64()) * u128::from(n)) >> 64) as u64
    }

    /// Standard normal (Box-Muller).
    pub fn normal(&mut self) -> f64 {
        let (u, v) = (1.0 - self.uniform(), self.uniform());
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    }

    /// Shuffles in place (Fisher-Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

/// Element `index` of a keyed permutation of 0..n, in constant memory: a four-round Feistel network on the smallest
/// even-bit domain that holds n, walked until it lands inside.
///
/// # Panics
/// When `index >= n`.
pub fn permute_index(index: u64, n: u64, key: u64) -> u64 {
    assert!(index < n, "index {index} of a permutation of {n}");
    let half_bits = (64 - (n - 1).leading_zeros()).div_ceil(2).max(1);
    let mask = (1u64 << half_bits) - 1;
    let mut x = index;
    loop {
        let (mut left, mut right) = (x >> half_bits, x & mask);
        for round in 0..4 {
            (left, right) = (right, left ^ (mix64(key ^ mix64(right ^ (round << 60))) & mask));
        }
        x = (left << half_bits) | right;
        if x < n {
            return x;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permutation_visits_every_index_once() {
        for n in [1, 2, 3, 7, 64, 1000, 4097] {
            let mut seen: Vec<u64> = (0..n).map(|i| permute_index(i, n, 42)).collect();
            seen.sort_unstable();
            assert!(seen.iter().enumerate().all(|(i, v)| i as u64 == *v), "n = {n}");
        }
    }

    #[test]
    fn normal_has_unit_variance() {
        let mut rng = Rng::new(1);
        let draws: Vec<f64> = (0..20_000).map(|_| rng.normal()).collect();
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        let variance = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / draws.len() as f64;
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
    }
}
