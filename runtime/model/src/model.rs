//! A model in memory: parameters by the table of `weight_names`, router biases, rotary table, precision.
//!
//! FP32 masters exist when the model is trainable; products read the encoding made from them by [`Model::encode`]. In a
//! BF16 or FP8 model the embedding and the head are BF16, norms and routers stay F32 (report §3.3.1).

use std::sync::{Arc, OnceLock};

use dsv3_ops::{Param, Precision, Tensor, Weight};
use rayon::prelude::*;

use crate::context::Shape;
use crate::decode::{self, Prepared};
use crate::weight_names::{BiasInfo, Graph, ParamInfo, Role, Table};
use crate::{Error, LatentType, ModelConfig, RopeScaling, init};

/// A DeepSeek-V3-class model.
///
/// ```
/// use dsv3_model::{Batch, Model, ModelConfig, TrainOptions};
/// use dsv3_ops::{Precision, Tape};
///
/// let config: ModelConfig = ModelConfig::from_json(br#"{
///     "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8,
///     "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 2, "kv_lora_rank": 8,
///     "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "n_routed_experts": 4,
///     "num_experts_per_tok": 2, "max_position_embeddings": 64
/// }"#)?;
/// let model = Model::init(&config, Precision::F32, 1)?;
/// let batch = Batch::from_rows([[1_u32, 5, 9, 2]]);
/// let out = model.forward_train(&mut Tape::inference(), &batch, TrainOptions::default())?;
/// assert_eq!(out.logp.value.shape(), [3]);
/// # Ok::<(), dsv3_model::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Model {
    /// Its sizes.
    pub config: ModelConfig,
    pub(crate) table: Arc<Table>,
    pub(crate) params: Vec<Param>,
    pub(crate) biases: Vec<Vec<f32>>,
    pub(crate) shape: Arc<Shape>,
    pub(crate) precision: Precision,
    pub(crate) latents: LatentType,
    /// What decoding reads, made on first use from the encodings of the moment.
    pub(crate) prepared: OnceLock<Arc<Prepared>>,
}

impl Model {
    /// A trainable model with random weights, a function of `config` and `seed` alone.
    ///
    /// # Errors
    /// When the configuration has problems.
    pub fn init(config: &ModelConfig, precision: Precision, seed: u64) -> Result<Self, Error> {
        checked(config)?;
        let table = Table::new(config);
        let sigma = config.initializer_range;
        let params =
            table.params.par_iter().map(|info| trainable(info, init::draw(info, sigma, seed), precision)).collect();
        let biases = table.biases.iter().map(|_| vec![0.0; config.n_routed_experts]).collect();
        Ok(Self::assemble(config.clone(), table, params, biases, precision))
    }

    /// A frozen model to measure: sizes, encodings and layout of [`Model::init`] followed by [`Model::freeze`], without ever
    /// holding all masters; random weights of the same variance, quicker to draw than Gaussian ones.
    ///
    /// # Errors
    /// When the configuration has problems.
    pub fn init_frozen(config: &ModelConfig, precision: Precision, seed: u64) -> Result<Self, Error> {
        checked(config)?;
        let table = Table::new(config);
        let params = table.params.iter().map(|info| {
            let weight = encoded(info.role, &init::draw_level(info, config.initializer_range, seed), precision);
            Param { id: info.id, compute: decode::laid_out(info, &weight), master: None }
        });
        let params = params.collect();
        let biases = table.biases.iter().map(|_| vec![0.0; config.n_routed_experts]).collect();
        Ok(Self::assemble(config.clone(), table, params, biases, precision))
    }

    /// Puts the parts of a checked configuration together.
    pub(crate) fn assemble(
        config: ModelConfig,
        table: Table,
        params: Vec<Param>,
        biases: Vec<Vec<f32>>,
        precision: Precision,
    ) -> Self {
        let shape = Arc::new(Shape::new(&config));
        let (table, prepared) = (Arc::new(table), OnceLock::new());
        Self { config, table, params, biases, shape, precision, latents: LatentType::F32, prepared }
    }

    /// How products of the linear layers are taken.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Element type of the latent caches that inference keeps: F32 unless [`Model::set_latents`] said otherwise. On the CPU
    /// that is as fast as BF16, and rollouts stay as near to the training path as the weights allow.
    pub fn latents(&self) -> LatentType {
        self.latents
    }

    /// Chooses the element type of latent caches.
    pub fn set_latents(&mut self, latents: LatentType) {
        self.latents = latents;
    }

    /// What each parameter is; by [`dsv3_ops::ParamId`].
    pub fn infos(&self) -> &[ParamInfo] {
        &self.table.params
    }

    /// The parameters; by [`dsv3_ops::ParamId`].
    pub fn params(&self) -> &[Param] {
        &self.params
    }

    /// The parameters, for an optimiser. Call [`Model::encode`] after changing masters.
    pub fn params_mut(&mut self) -> &mut [Param] {
        self.prepared = OnceLock::new();
        &mut self.params
    }

    /// What each parameter is and its master, for an optimiser that changes all of them; [`Model::encode`] must follow.
    /// An encoding that shares the master's buffer is let go first, so that the master changes where it lies.
    pub fn masters_mut(&mut self) -> impl Iterator<Item = (&ParamInfo, &mut Tensor)> {
        let params = self.params_mut_with_infos();
        params.filter_map(|(info, param)| {
            let Param { master, compute, .. } = param;
            let master = master.as_mut()?;
            if compute.precision() == Precision::F32 {
                let exceptions = compute.exceptions();
                *compute = Weight::from_plain(Tensor::f32(&[0], Vec::new())).with_exceptions(exceptions);
            }
            Some((info, master))
        })
    }

    fn params_mut_with_infos(&mut self) -> impl Iterator<Item = (&ParamInfo, &mut Param)> {
        self.prepared = OnceLock::new();
        self.table.params.iter().zip(&mut self.params)
    }

    /// Layer and name of each router bias.
    pub fn bias_infos(&self) -> &[BiasInfo] {
        &self.table.biases
    }

    /// Router biases, `[experts]` each, in the order of [`Model::bias_infos`].
    pub fn biases(&self) -> &[Vec<f32>] {
        &self.biases
    }

    /// Router biases, for their update after a step.
    pub fn biases_mut(&mut self) -> &mut [Vec<f32>] {
        &mut self.biases
    }

    /// Replaces master `id` and its encoding.
    ///
    /// # Panics
    /// When the shape is another.
    pub fn set_master(&mut self, id: dsv3_ops::ParamId, master: Tensor) {
        let info = &self.table.params[id as usize];
        assert_eq!(info.shape, master.shape(), "{}", info.name);
        self.prepared = OnceLock::new();
        let param = &mut self.params[id as usize];
        param.compute = encoded(info.role, &master, self.precision).with_exceptions(param.compute.exceptions());
        param.master = Some(master);
    }

    /// Makes every encoding anew from its master; once per optimiser step.
    pub fn encode(&mut self) {
        self.prepared = OnceLock::new();
        let (table, precision) = (&self.table, self.precision);
        self.params.par_iter_mut().zip(&table.params).for_each(|(param, info)| {
            if let Some(master) = &param.master {
                param.compute = encoded(info.role, master, precision).with_exceptions(param.compute.exceptions());
            }
        });
    }

    /// Changes the precision of a trainable model.
    pub fn set_precision(&mut self, precision: Precision) {
        self.precision = precision;
        self.encode();
    }

    /// Drops masters and lays weights out for decoding, to serve a model that was trained here.
    pub fn freeze(&mut self) {
        self.prepared = OnceLock::new();
        self.params.par_iter_mut().zip(&self.table.params).for_each(|(param, info)| {
            param.master = None;
            param.compute = decode::laid_out(info, &param.compute);
        });
    }

    /// Whether masters exist.
    pub fn is_trainable(&self) -> bool {
        self.params.iter().all(|param| param.master.is_some())
    }

    /// Changes the rotary scaling and the longest position.
    ///
    /// # Errors
    /// When they do not fit together; the model is unchanged then.
    pub fn set_rope(&mut self, scaling: Option<RopeScaling>, max_positions: usize) -> Result<(), Error> {
        let config =
            ModelConfig { rope_scaling: scaling, max_position_embeddings: max_positions, ..self.config.clone() };
        checked(&config)?;
        self.shape = Arc::new(Shape::new(&config));
        self.config = config;
        Ok(())
    }

    /// Bytes of the encodings that products read.
    pub fn compute_bytes(&self) -> usize {
        self.params.iter().map(|param| param.compute.bytes()).sum()
    }

    pub(crate) fn graph(&self) -> &Graph {
        &self.table.graph
    }
}

/// Refuses a configuration with problems.
pub(crate) fn checked(config: &ModelConfig) -> Result<(), Error> {
    let problems = config.check();
    if problems.is_empty() { Ok(()) } else { Err(Error::Config { problems }) }
}

/// A parameter with a master.
pub(crate) fn trainable(info: &ParamInfo, master: Tensor, precision: Precision) -> Param {
    Param { id: info.id, compute: encoded(info.role, &master, precision), master: Some(master) }
}

/// The encoding of `master` in a model of `precision`.
pub(crate) fn encoded(role: Role, master: &Tensor, precision: Precision) -> Weight {
    Weight::encode(master, &role_precision(role, precision))
}

fn role_precision(role: Role, precision: Precision) -> Precision {
    match (role, precision) {
        (Role::Norm | Role::Router, _) => Precision::F32,
        (Role::Embedding | Role::Head, Precision::F32) => Precision::F32,
        (Role::Embedding | Role::Head, _) => Precision::Bf16,
        (Role::Linear | Role::Projection, precision) => precision,
    }
}
