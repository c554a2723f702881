//! The training curves: a panel for each training stage, a line for each run, validation as points.
//!
//! A stage is a training stage when it logged a loss by step. Where it logged a mean reward too, as a policy does, that
//! is drawn: a policy's loss says nothing. A long series is drawn as means over equal
//! numbers of steps, since single steps are mostly noise, and the panel's title says how many.

use dsv3_core::Error;
use dsv3_engine::{Report, ReportedStage};
use plotters::{coord::Shift, prelude::*, style::text_anchor::HPos};

use super::{
    counted, labels,
    style::{self, GRID, INK, LARGE, MEDIUM, SMALL, UNITS, failed},
};

/// Metrics drawn as lines, the first that a stage logged, with the name of the axis.
const LINES: [(&str, &str); 2] = [("reward_mean", "mean reward"), ("loss", "loss (nats per token)")];
/// Metric drawn as points beside the loss.
const POINTS: &str = "val_loss";
/// Most points of a line.
const POINTS_MAX: usize = 60;
/// Panels of a picture's row, by the number of panels; more make rows of three.
const A_ROW: [usize; 5] = [1, 1, 2, 3, 2];
const PANEL_HEIGHT: i32 = 250 * UNITS;
/// Radius of a validation point.
const POINT: i32 = 7 * UNITS / 2;
const LEGEND_LINE: i32 = 26 * UNITS;

/// One stage.
struct Panel<'a> {
    stage: &'a str,
    axis: &'static str,
    /// Steps that one point of a line stands for.
    bucket: usize,
    /// By run, empty where it has none.
    lines: Vec<Vec<(f64, f64)>>,
    points: Vec<Vec<(f64, f64)>>,
}

/// The plot and what it shows; none when no stage has a curve.
pub(super) fn draw(report: &Report) -> Result<Option<(String, String)>, Error> {
    let panels = panels(report);
    if panels.is_empty() {
        return Ok(None);
    }
    let columns = A_ROW.get(panels.len()).copied().unwrap_or(3);
    let rows = panels.len().div_ceil(columns);
    let width = columns as i32 * if columns < 3 { 440 } else { 340 } * UNITS;
    let body = PANEL_HEIGHT * rows as i32;
    let legend = legend(report, &panels, width);
    let height = body + legend.last().map_or(0, |(_, (_, y), _)| *y) + LEGEND_LINE;
    let svg = style::svg((width, height), |root| {
        let (grid, foot) = root.split_vertically(body);
        for (area, panel) in grid.split_evenly((rows, columns)).iter().zip(&panels) {
            draw_panel(area, panel)?;
        }
        legend.iter().try_for_each(|entry| draw_entry(&foot, entry))
    })?;
    let names: Vec<&str> = panels.iter().map(|panel| panel.stage).collect();
    Ok(Some((svg, format!("curves of {}: {}", counted(panels.len(), "training stage"), names.join(", ")))))
}

fn panels(report: &Report) -> Vec<Panel<'_>> {
    let mut names: Vec<&str> = Vec::new();
    for stage in report.runs.iter().flat_map(|run| &run.stages) {
        if stage.series.contains_key("loss") && !names.contains(&stage.stage.as_str()) {
            names.push(&stage.stage);
        }
    }
    names.into_iter().filter_map(|name| panel(report, name)).collect()
}

fn panel<'a>(report: &'a Report, name: &'a str) -> Option<Panel<'a>> {
    let stage = |run: &'a dsv3_engine::ReportedRun| run.stages.iter().find(|stage| stage.stage == name);
    let stages: Vec<Option<&ReportedStage>> = report.runs.iter().map(stage).collect();
    let logged = |metric: &str| stages.iter().flatten().any(|stage| stage.series.contains_key(metric));
    let (metric, axis) = LINES.into_iter().find(|(metric, _)| logged(metric))?;
    let of = |metric: &str| -> Vec<Vec<(f64, f64)>> {
        let finite = |series: &Vec<(u64, f64)>| {
            series.iter().filter(|(_, value)| value.is_finite()).map(|(step, value)| (*step as f64, *value)).collect()
        };
        stages
            .iter()
            .map(|stage| stage.and_then(|stage| stage.series.get(metric)).map(finite).unwrap_or_default())
            .collect()
    };
    let lines = of(metric);
    let longest = lines.iter().map(Vec::len).max().unwrap_or(0);
    let bucket = longest.div_ceil(POINTS_MAX).max(1);
    let lines = lines.iter().map(|line| line.chunks(bucket).map(mean).collect()).collect();
    let points = if metric == "loss" { of(POINTS) } else { Vec::new() };
    Some(Panel { stage: name, axis, bucket, lines, points })
}

fn mean(points: &[(f64, f64)]) -> (f64, f64) {
    let count = points.len().max(1) as f64;
    let sum = points.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
    (sum.0 / count, sum.1 / count)
}

fn draw_panel(area: &DrawingArea<SVGBackend<'_>, Shift>, panel: &Panel<'_>) -> Result<(), Error> {
    let all = || panel.lines.iter().chain(&panel.points).flatten();
    let last_step = all().map(|point| point.0).fold(1.0, f64::max);
    let (low, high) = all().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), (_, y)| (low.min(*y), high.max(*y)));
    let room = ((high - low) * 0.06).max(high.abs() * 1e-3).max(1e-9);
    let each = match panel.bucket {
        1 => String::new(),
        steps => format!(" (means of {steps} steps)"),
    };
    let mut chart = ChartBuilder::on(area)
        .margin(10 * UNITS)
        .margin_right(18 * UNITS)
        .caption(format!("{}{each}", panel.stage), style::text(LARGE, HPos::Left))
        .x_label_area_size(42 * UNITS)
        .y_label_area_size(56 * UNITS)
        .build_cartesian_2d(0.0..last_step, (low - room)..(high + room))
        .map_err(failed)?;
    let decimals = decimals(high - low);
    chart
        .configure_mesh()
        .x_labels(5)
        .y_labels(8)
        .x_desc("step")
        .y_desc(panel.axis)
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&|value| format!("{value:.decimals$}"))
        .label_style(("sans-serif", SMALL).into_font().color(&INK))
        .axis_desc_style(("sans-serif", MEDIUM).into_font().color(&INK))
        .axis_style(INK.stroke_width(UNITS as u32))
        .bold_line_style(GRID.stroke_width(UNITS as u32))
        .set_all_tick_mark_size(5 * UNITS)
        .light_line_style(TRANSPARENT)
        .draw()
        .map_err(failed)?;
    for (i, line) in panel.lines.iter().enumerate().filter(|(_, line)| !line.is_empty()) {
        let stroke = style::colour(i).stroke_width(UNITS as u32 * 5 / 4);
        chart.draw_series(LineSeries::new(line.iter().copied(), stroke)).map_err(failed)?;
    }
    for (i, points) in panel.points.iter().enumerate() {
        let circles = points.iter().map(|at| Circle::new(*at, POINT, style::colour(i).filled()));
        chart.draw_series(circles).map_err(failed)?;
        let rims = points.iter().map(|at| Circle::new(*at, POINT, INK.stroke_width(UNITS as u32)));
        chart.draw_series(rims).map_err(failed)?;
    }
    Ok(())
}

/// Decimals of ticks on an axis of this length.
fn decimals(length: f64) -> usize {
    (1.0 - length.max(1e-12).log10().floor()).clamp(0.0, 6.0) as usize
}

/// An entry of the legend: its text, where it begins, and the run it names; none for the validation.
type Entry = (String, (i32, i32), Option<usize>);

/// The entries, in lines no longer than the picture.
fn legend(report: &Report, panels: &[Panel<'_>], width: i32) -> Vec<Entry> {
    let mut names: Vec<(String, Option<usize>)> =
        labels(&report.runs).into_iter().enumerate().map(|(i, run)| (run, Some(i))).collect();
    if panels.iter().any(|panel| panel.points.iter().any(|run| !run.is_empty())) {
        names.push(("validation".to_owned(), None));
    }
    let left = 60 * UNITS;
    let (mut x, mut y) = (left, LEGEND_LINE / 2);
    let mut entries = Vec::new();
    for (name, run) in names {
        let wide = 54 * UNITS + style::width(&name);
        if x + wide > width && x > left {
            (x, y) = (left, y + LEGEND_LINE);
        }
        entries.push((name, (x, y), run));
        x += wide;
    }
    entries
}

fn draw_entry(area: &DrawingArea<SVGBackend<'_>, Shift>, (name, (x, y), run): &Entry) -> Result<(), Error> {
    let (x, y) = (*x, *y);
    match run {
        Some(run) => {
            let stroke = [(x, y - UNITS), (x + 22 * UNITS, y + UNITS)];
            area.draw(&Rectangle::new(stroke, style::colour(*run).filled())).map_err(failed)?;
        }
        None => area.draw(&Circle::new((x + 11 * UNITS, y), POINT, INK.stroke_width(UNITS as u32))).map_err(failed)?,
    }
    area.draw(&Text::new(name.clone(), (x + 28 * UNITS, y), style::text(MEDIUM, HPos::Left))).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_series_become_means_and_ticks_get_decimals() {
        assert_eq!(mean(&[(1.0, 4.0), (2.0, 2.0)]), (1.5, 3.0));
        assert_eq!([40.0, 4.0, 0.4, 0.04].map(decimals), [0, 1, 2, 3]);
    }
}
