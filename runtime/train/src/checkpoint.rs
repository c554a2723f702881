//! A trainer as files and back, bit for bit.
//!
//! `masters.safetensors`: FP32 masters and router biases by their published names (experts stacked).
//! `moments.safetensors`: `first.NAME` and `second.NAME`, BF16 or F32; each in several files when several ranks save
//! (`shards.rs`). State JSON: `{format, updates, state: TrainerState}`, with the loader's cursor in it; floats are written
//! so that they read back to the same bits. No clock, no rate, no host: equal runs write equal bytes.

use bytes::Bytes;
use dsv3_model::Model;
use dsv3_ops::DType;
use dsv3_store::{Buffers, TensorEntry, TensorRole};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    shards::{Elements, Files, Live, StoredTensors},
    trainer::{Trainer, TrainerState},
};

/// File of the FP32 masters and router biases, when one rank saves.
pub const MASTERS: &str = "masters.safetensors";
/// File of the optimiser's moments, when one rank saves.
pub const MOMENTS: &str = "moments.safetensors";
const MASTERS_GROUP: &str = "masters";
const MOMENTS_GROUP: &str = "moments";
/// Version written by this build.
const FORMAT: u32 = 1;

/// A trainer as bytes.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Steps done.
    pub step: u64,
    /// Name and content of each file.
    pub files: Vec<(String, Bytes)>,
    /// What slices of which tensors the files hold.
    pub tensors: Vec<TensorEntry>,
    /// Everything else.
    pub state: serde_json::Value,
}

impl Snapshot {
    /// Content of a file.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn read(&self, name: &str) -> Result<Bytes, dsv3_core::Error> {
        let file = self.files.iter().find(|(file, _)| file == name);
        file.map(|(_, bytes)| bytes.clone()).ok_or_else(|| dsv3_core::Error::data(format!("no file {name}")))
    }
}

#[derive(Serialize, Deserialize)]
struct StateFile {
    format: u32,
    updates: u64,
    state: TrainerState,
}

impl Trainer {
    /// Everything a later step depends on, as one rank saves it.
    ///
    /// # Errors
    /// When the state cannot be written.
    pub fn snapshot(&self) -> Result<Snapshot> {
        self.snapshot_for(1)
    }

    /// [`Self::snapshot`] as `ranks` ranks save it, each its slice of every tensor.
    ///
    /// # Errors
    /// As [`Self::snapshot`].
    pub fn snapshot_for(&self, ranks: usize) -> Result<Snapshot> {
        self.snapshot_into(&Buffers::new(Vec::new()), ranks)
    }

    /// [`Self::snapshot_for`] into memory of `buffers`, which goes back there when the snapshot's files are dropped.
    ///
    /// # Errors
    /// As [`Self::snapshot`].
    pub fn snapshot_into(&self, buffers: &Buffers, ranks: usize) -> Result<Snapshot> {
        let files = self.files(ranks)?;
        let state = StateFile { format: FORMAT, updates: self.optimizer.updates(), state: self.state.clone() };
        let state = serde_json::to_value(state).map_err(|source| Error::State { source })?;
        let step = self.state.earlier_steps + self.state.step;
        Ok(Snapshot { step, files: files.write(buffers)?, tensors: files.table, state })
    }

    /// Memory for the snapshots of `ranks` ranks, one at a time; none is taken yet.
    ///
    /// # Errors
    /// As [`Self::snapshot`].
    pub fn snapshot_buffers(&self, ranks: usize) -> Result<Buffers> {
        Ok(Buffers::new(self.files(ranks)?.lengths()))
    }

    fn files(&self, ranks: usize) -> Result<Files<'_>> {
        Files::of(vec![(MASTERS_GROUP, self.masters()?), (MOMENTS_GROUP, self.moments())], ranks)
    }

    fn masters(&self) -> Result<Vec<Live<'_>>> {
        let masters = self.model.infos().iter().zip(self.model.params()).map(|(info, param)| {
            let master = param.master.as_ref().ok_or_else(|| Error::NotTrainable { name: info.name.clone() })?;
            let (name, shape) = (info.name.clone(), master.shape().to_vec());
            Ok(Live { name, role: TensorRole::Master, shape, elements: Elements::of(master) })
        });
        let biases = self.model.bias_infos().iter().zip(self.model.biases()).map(|(info, bias)| {
            let (name, shape) = (info.name.clone(), vec![bias.len()]);
            Ok(Live { name, role: TensorRole::RouterBias, shape, elements: Elements::F32(bias) })
        });
        masters.chain(biases).collect()
    }

    fn moments(&self) -> Vec<Live<'_>> {
        let (first, second) = self.optimizer.moments();
        let live = |name: String, moment| {
            let shape = dsv3_ops::Tensor::shape(moment).to_vec();
            Live { name, role: TensorRole::Moment, shape, elements: Elements::of(moment) }
        };
        let pairs = self.model.infos().iter().zip(first.iter().zip(second));
        pairs
            .flat_map(|(info, (m, v))| {
                [live(format!("first.{}", info.name), m), live(format!("second.{}", info.name), v)]
            })
            .collect()
    }

    /// Puts a snapshot's content in place of this trainer's, whatever number of ranks saved it. `read` gives a file by
    /// name; `tensors` is empty for a checkpoint of format 1.
    ///
    /// # Errors
    /// When a file is missing, damaged, or of another model; the trainer is not to be used then.
    pub fn restore(
        &mut self,
        state: &serde_json::Value,
        tensors: &[TensorEntry],
        read: impl FnMut(&str) -> Result<Bytes, dsv3_core::Error>,
    ) -> Result<()> {
        let state = StateFile::deserialize(state).map_err(|source| Error::State { source })?;
        if state.format != FORMAT {
            let problem = format!(
                "its state has format {}, this build reads {FORMAT}: use the dsv3-pipeline that wrote it, or a newer one",
                state.format
            );
            return Err(Error::Checkpoint { file: "state".to_owned(), problem });
        }
        let stored = StoredTensors::open(tensors, &[MASTERS, MOMENTS], read)?;
        restore_masters(&mut self.model, &stored)?;
        for (id, info) in self.model.infos().iter().enumerate() {
            let (m, v) = (&mut self.optimizer.first[id], &mut self.optimizer.second[id]);
            *m = stored.tensor(&format!("first.{}", info.name), m.dtype(), m.shape())?;
            *v = stored.tensor(&format!("second.{}", info.name), v.dtype(), v.shape())?;
        }
        self.optimizer.updates = state.updates;
        self.state = state.state;
        Ok(())
    }
}

fn restore_masters(model: &mut Model, stored: &StoredTensors) -> Result<()> {
    for id in 0..model.infos().len() {
        let info = &model.infos()[id];
        let master = stored.tensor(&info.name, DType::F32, &info.shape)?;
        model.params_mut()[id].master = Some(master);
    }
    for index in 0..model.bias_infos().len() {
        let shape = [model.biases()[index].len()];
        let bias = stored.tensor(&model.bias_infos()[index].name, DType::F32, &shape)?;
        model.biases_mut()[index] = bias.into_f32();
    }
    model.encode();
    Ok(())
}
