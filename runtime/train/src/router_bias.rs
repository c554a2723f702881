//! Auxiliary-loss-free load balancing: after a step, b_i += γ·sign(mean_j load_j − load_i), FP32, sign(0) = 0.
//!
//! The loads are (token, slot) choices over all micro-batches of the step, layer by layer, prediction modules included.
//! Means are compared as whole numbers, n·load_i against Σ load, so equality is exact. Report §2.1.2.

use std::{cmp::Ordering, collections::BTreeMap};

use dsv3_model::Model;

/// Tokens sent to every expert, by layer.
pub type Loads = BTreeMap<usize, Vec<u64>>;

/// Adds the loads of one micro-batch.
pub fn add_loads(sum: &mut Loads, loads: &[(usize, Vec<u64>)]) {
    for (layer, loads) in loads {
        let total = sum.entry(*layer).or_insert_with(|| vec![0; loads.len()]);
        total.iter_mut().zip(loads).for_each(|(total, load)| *total += load);
    }
}

/// Updates the biases of every layer that has loads; γ = 0 changes nothing.
pub fn update(model: &mut Model, loads: &Loads, gamma: f64) {
    if gamma == 0.0 {
        return;
    }
    let layers: Vec<usize> = model.bias_infos().iter().map(|info| info.layer).collect();
    for (bias, layer) in model.biases_mut().iter_mut().zip(layers) {
        if let Some(loads) = loads.get(&layer) {
            update_layer(bias, loads, gamma as f32);
        }
    }
}

fn update_layer(bias: &mut [f32], loads: &[u64], gamma: f32) {
    let (count, total) = (loads.len() as u64, loads.iter().sum::<u64>());
    for (bias, load) in bias.iter_mut().zip(loads) {
        match (load * count).cmp(&total) {
            Ordering::Less => *bias += gamma,
            Ordering::Greater => *bias -= gamma,
            Ordering::Equal => {}
        }
    }
}

/// Largest load over mean load of a layer; 1 is perfect balance, 0 means no token.
pub fn imbalance(loads: &[u64]) -> f64 {
    let total: u64 = loads.iter().sum();
    let largest = loads.iter().max().copied().unwrap_or(0);
    if total == 0 { 0.0 } else { largest as f64 * loads.len() as f64 / total as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sign_of_the_distance_to_the_mean() {
        let mut bias = vec![0.5, 0.0, 0.0];
        update_layer(&mut bias, &[9, 3, 6], 0.25);
        assert_eq!(bias, [0.25, 0.25, 0.0]);
        assert_eq!(imbalance(&[9, 3, 6]), 1.5);
    }
}
