// Draws the book's figures from the JSON each of them holds: plots (.bk-plot), linked volumes (.bk-volumes), the epsilon dial
// (.bk-dial), the attribute dial (.bk-levels) and the mechanism in motion (.bk-mechanism). The libraries lie beside this script, and each is loaded when the
// first figure that needs it comes near the screen: over http and from disk alike. Slices need no library and no WebGL.
(() => {
  const assets = new URL(`${document.documentElement.dataset.content_root}_static/`, location.href);
  const element = (name, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children.filter(Boolean));
    return made;
  };
  const lacking = (shown, name) => element("p", {
    className: "bk-lacking",
    textContent: `${shown}, because ${name} could not be fetched when this book was built: build it again with a network connection.`,
  });
  const libraries = window.bkLibraries ?? {}; // an output in a live notebook brings its own
  // right ventricle blue, myocardium green, left ventricle red, as in the walls of stacks
  const LABELS = { R: [0, 86, 0, 213], G: [0, 180, 158, 94], B: [0, 233, 115, 0], A: [0, 255, 255, 255], I: [0, 1, 2, 3] };
  const load = (file) => (libraries[file] ??= new Promise((resolve, reject) => {
    document.head.append(element("script", { src: new URL(file, assets), onload: resolve, onerror: reject }));
  }));
  const content = (box) => JSON.parse(box.querySelector("script").textContent);
  const failed = (box, error) => {
    box.append(element("p", { className: "bk-error", textContent: `This figure can't be drawn here: ${error.message ?? error}` }));
    console.error(error);
  };
  const scrolling = (table) => { // where it's wider than its place
    const frame = element("div", { className: "bk-scroll", tabIndex: 0 }, table);
    frame.setAttribute("role", "region");
    frame.setAttribute("aria-label", "table");
    return frame;
  };
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

  // ---- plots

  const dark = () => document.documentElement.dataset.theme === "dark";
  const small = matchMedia("screen and (max-width: 600px)");
  const merge = (into, changes) => Object.entries(changes).forEach(([key, value]) => {
    if (value && typeof value === "object" && into[key] && key !== "domain") merge(into[key], value);
    else into[key] = value;
  });
  function themed(layout) { // a figure's layout in the page's colours, and as it's meant for a narrow screen
    const [paper, ink, grid, rule] = dark() ? ["#14181e", "#ced6dd", "#3a424c", "#8c959f"] : ["white", "#24292f", "#e3e6ea", "#8c959f"];
    const shown = structuredClone(layout);
    if (small.matches) merge(shown, layout.meta?.narrow ?? {});
    const style = (shown.template ??= {}).layout ??= {};
    const axis = { gridcolor: grid, linecolor: rule };
    const xaxis = { ...style.xaxis, ...axis, automargin: true }, yaxis = { ...style.yaxis, ...axis, automargin: true };
    Object.assign(style, { paper_bgcolor: paper, plot_bgcolor: paper, font: { ...style.font, color: ink }, xaxis, yaxis });
    style.hoverlabel = { ...style.hoverlabel, bgcolor: paper, bordercolor: grid, font: { color: ink } };
    return shown;
  }

  const csv = ({ data, layout }) => {
    const quoted = (cell) => `"${String(cell ?? "").replaceAll('"', '""')}"`;
    const title = (axis) => (layout[axis]?.title?.text ?? "").replace(/<[^>]+>/g, " ");
    const rows = data.flatMap((trace) => Array.from(trace.x ?? [], (x, i) => [
      trace.name ?? "", title((trace.xaxis ?? "x").replace(/^x/, "xaxis")), x, trace.y?.[i], trace.error_y?.array?.[i] ?? trace.error_x?.array?.[i],
      trace.error_y?.arrayminus?.[i] ?? trace.error_x?.arrayminus?.[i],
    ]));
    return [["series", "axis", "x", "y", "above", "below"], ...rows].map((row) => row.map(quoted).join(",")).join("\r\n");
  };

  async function drawPlot(box) {
    await load("plotly.min.js");
    const figure = content(box);
    const config = { responsive: true, displaylogo: false, showSendToCloud: false, modeBarButtonsToRemove: ["sendChartToCloud", "select2d", "lasso2d", "autoScale2d"] };
    const stage = element("div");
    box.querySelectorAll(":scope > img").forEach((still) => still.remove());
    box.prepend(stage);
    const draw = () => Plotly.react(stage, structuredClone(figure.data), themed(figure.layout), config);
    await draw();
    stage.querySelectorAll("svg").forEach((svg) => svg.setAttribute("aria-hidden", "true")); // the box says what it shows
    if (figure.data.some(({ x }) => x) && figure.data[0].type !== "image") {
      const address = () => URL.createObjectURL(new Blob([csv({ ...figure, data: stage.data ?? figure.data })], { type: "text/csv" }));
      const link = element("a", { href: "#", download: "figure.csv", textContent: "data (CSV)", className: "bk-data" });
      link.addEventListener("click", () => { link.href = address(); });
      box.append(link);
    }
    new MutationObserver(draw).observe(document.documentElement, { attributeFilter: ["data-theme"] });
    small.addEventListener("change", draw);
  }

  // ---- volumes, slice by slice

  async function unpacked(base64) { // a gzipped 8-bit NIfTI file: its grid, its voxels with columns first
    const packed = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    const buffer = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
    const header = new DataView(buffer);
    const [width, height, depth] = [42, 44, 46].map((at) => header.getInt16(at, true));
    return { width, height, depth, mm: header.getFloat32(80, true), voxels: new Uint8Array(buffer, header.getFloat32(108, true)) };
  }

  function paint(canvas, volume, look, labels, minus) { // one slice; minus: the volume to subtract
    const { width, height, mm } = volume, size = width * height, start = look.slice * size;
    const picture = new ImageData(width, height), pixels = picture.data;
    const [low, high] = [look.level - look.window / 2, look.level + look.window / 2];
    for (let i = 0; i < size; i++) {
      const value = volume.voxels[start + i], label = labels?.voxels[start + i] ?? 0;
      const grey = clamp(255 * (value - low) / (high - low), 0, 255);
      let colour = [grey, grey, grey];
      if (minus) { // brighter than the other: vermillion, darker: blue
        const change = clamp(3 * (value - minus.voxels[start + i]), -255, 255), weak = 255 - Math.abs(change);
        colour = change > 0 ? [255, weak + (255 - weak) * 0.37, weak] : [weak, weak + (255 - weak) * 0.45, 255];
      } else if (label) {
        colour = colour.map((part, k) => (1 - look.opacity) * part + look.opacity * LABELS["RGB"[k]][label]);
      }
      pixels.set([...colour, 255], 4 * i);
    }
    const small = new OffscreenCanvas(width, height);
    small.getContext("2d").putImageData(picture, 0, 0);
    const scale = 4;
    Object.assign(canvas, { width: width * scale, height: height * scale });
    const pen = canvas.getContext("2d");
    pen.imageSmoothingQuality = "high";
    pen.drawImage(small, 0, 0, canvas.width, canvas.height);
    Object.assign(pen, { font: "15px system-ui, sans-serif", fillStyle: minus ? "#222" : "white", textBaseline: "middle", textAlign: "center" });
    if (!minus) Object.assign(pen, { shadowColor: "black", shadowBlur: 4 });
    const [w, h] = [canvas.width, canvas.height], bar = 50 / mm * scale;
    pen.fillText("R", 12, h / 2); // the patient's right is on the picture's left
    pen.fillText("L", w - 12, h / 2);
    pen.fillText("A", w / 2, 12);
    pen.fillText("P", w / 2, h - 30);
    pen.fillRect(12, h - 14, bar, 3);
    pen.fillText("5 cm", 12 + bar / 2, h - 25);
  }

  const range = (label, properties, changed) => {
    const input = element("input", { type: "range", ...properties });
    input.addEventListener("input", () => changed(Number(input.value)));
    return [element("label", { className: "bk-range" }, element("span", { textContent: label }), input), input];
  };

  function linked(look, redraw, depth, hasLabels) { // what all panels of a viewer share; returns its controls and its keys
    const told = element("output", { className: "bk-slice" });
    const [slices, slider] = range("slice", { min: 0, max: depth - 1, value: look.slice }, (value) => move(value));
    const [levels, level] = range("brightness", { min: 0, max: 255, value: 255 - look.level }, (value) => { look.level = 255 - value; redraw(); });
    const [windows, contrast] = range("contrast", { min: 5, max: 250, value: 260 - look.window }, (value) => { look.window = 260 - value; redraw(); });
    const controls = element("div", { className: "bk-controls" }, slices, told, levels, windows);
    const say = () => { told.value = `${look.slice + 1} of ${depth}, from base to apex`; };
    const move = (slice) => {
      look.slice = clamp(slice, 0, depth - 1);
      slider.value = look.slice;
      say();
      redraw();
    };
    if (hasLabels) {
      const toggle = element("input", { type: "checkbox", checked: look.overlay });
      toggle.addEventListener("change", () => { look.overlay = toggle.checked; redraw(); });
      controls.append(
        element("label", { className: "bk-toggle" }, toggle, " segmentation"),
        range("opacity", { min: 0, max: 100, value: 100 * look.opacity }, (value) => { look.opacity = value / 100; redraw(); })[0],
      );
      look.flipOverlay = () => toggle.click();
    }
    say();
    const window_ = (right, down) => {
      look.window = clamp(look.window - right, 10, 255);
      look.level = clamp(look.level + down, 0, 255);
      [level.value, contrast.value] = [255 - look.level, 260 - look.window];
      redraw();
    };
    return { controls, move, window: window_ };
  }

  function listen(box, stage, look, shared, keys = {}) { // wheel, drag and keys; a finger that moves scrolls the page
    stage.tabIndex = 0;
    stage.addEventListener("keydown", (event) => {
      const step = { ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1 }[event.key];
      if (step) shared.move(look.slice + step);
      else if (event.key === "o" && look.flipOverlay) look.flipOverlay();
      else if (keys[event.key]) keys[event.key]();
      else return;
      event.preventDefault();
    });
    stage.addEventListener("wheel", (event) => {
      if (!stage.contains(document.activeElement)) return; // a page that scrolls past isn't held up
      event.preventDefault();
      shared.move(look.slice + Math.sign(event.deltaY));
    }, { passive: false });
    stage.addEventListener("pointermove", (event) => {
      if (event.buttons === 1 && event.pointerType === "mouse" && event.target.tagName === "CANVAS") shared.window(event.movementX, event.movementY);
    });
  }

  const firstLook = (depth) => ({ slice: Math.floor(depth / 2), level: 128, window: 255, overlay: true, opacity: 0.4 });
  const panel = (title) => {
    const canvas = element("canvas", { role: "img" });
    canvas.setAttribute("role", "img");
    return { canvas, caption: element("figcaption", { textContent: title }) };
  };

  async function drawVolumes(box) {
    const { volumes, badge } = content(box);
    const files = await Promise.all(volumes.map(async ({ nifti, labels }) => [await unpacked(nifti), labels && await unpacked(labels)]));
    const phases = [...new Set(volumes.map(({ phase }) => phase).filter(Boolean))];
    const look = { ...firstLook(files[0][0].depth), phase: phases[0], difference: false };
    const panels = volumes.map(({ title }) => panel(title));
    const figures = panels.map(({ canvas, caption }) => element("figure", {}, canvas, caption));
    const shownNow = () => volumes.map((_, i) => i).filter((i) => !look.phase || volumes[i].phase === look.phase);
    const redraw = () => {
      const shown = shownNow(), first = files[shown[0]][0];
      panels.forEach(({ canvas, caption }, i) => {
        figures[i].hidden = !shown.includes(i);
        if (figures[i].hidden) return;
        const minus = look.difference && i !== shown[0] ? first : null;
        paint(canvas, files[i][0], look, look.overlay ? files[i][1] : null, minus);
        caption.textContent = volumes[i].title + (minus ? `, less ${volumes[shown[0]].title}` : "");
        canvas.setAttribute("aria-label", `${badge ? `${badge}: ` : ""}${caption.textContent}, slice ${look.slice + 1}`);
      });
    };
    const shared = linked(look, redraw, files[0][0].depth, files.some(([, labels]) => labels));
    const stage = element("div", { className: "bk-panels" }, ...figures);
    stage.setAttribute("role", "group");
    stage.setAttribute("aria-label", "Linked slices: arrow keys move through the volume, d shows differences, f flips the phase, o the segmentation");
    const button = (text, pressed, press) => {
      const made = element("button", { type: "button", textContent: text });
      made.setAttribute("aria-pressed", pressed);
      made.addEventListener("click", () => made.setAttribute("aria-pressed", press()));
      shared.controls.append(made);
      return made;
    };
    const keys = {};
    if (volumes.length > 1) {
      const differs = button("difference", false, () => { look.difference = !look.difference; redraw(); return look.difference; });
      keys.d = () => differs.click();
    }
    if (phases.length > 1) {
      const flips = button("ED / ES", false, () => { look.phase = phases[1 - phases.indexOf(look.phase)]; redraw(); return look.phase === phases[1]; });
      keys.f = () => flips.click();
    }
    const solid = button("turn in 3D", false, () => {
      const open = !box.querySelector(".bk-stage");
      open ? openSolid(box, volumes, shownNow()[0]) : closeSolid(box);
      return open;
    });
    box.solidButton = solid;
    listen(box, stage, look, shared, keys);
    box.querySelectorAll(":scope > img").forEach((still) => still.remove());
    box.append(badge ? element("p", { className: "bk-badge", textContent: badge }) : "", stage, shared.controls);
    box.style.minHeight = 0;
    redraw();
  }

  // ---- one volume in 3D, by NiiVue; its context is freed when it leaves the screen

  const solids = new Map(); // box -> what frees its context
  function closeSolid(box) {
    solids.get(box)?.();
    solids.delete(box);
    box.querySelectorAll(".bk-stage, .bk-titles").forEach((part) => part.remove());
    box.solidButton.setAttribute("aria-pressed", false);
  }
  async function openSolid(box, volumes, chosen) {
    const stage = element("div", { className: "bk-stage" });
    const canvas = element("canvas");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", "A volume in 3D: drag to turn it");
    const buttons = volumes.map(({ title, phase }, i) => element("button", { textContent: phase && !title.includes(phase) ? `${title}, ${phase}` : title, onclick: () => show(i) }));
    const bar = element("div", { className: "bk-titles" }, ...buttons);
    stage.append(canvas);
    box.append(bar, stage);
    try {
      await load("vendor/niivue/niivue.umd.js");
    } catch {
      stage.remove();
      return bar.replaceWith(lacking("This volume can't be turned", "NiiVue"));
    }
    let viewer;
    async function show(number) {
      chosen = number;
      buttons.forEach((one, i) => one.setAttribute("aria-pressed", i === number));
      const { nifti, labels } = volumes[number];
      const image = await niivue.NVImage.loadFromBase64({ base64: nifti, name: "volume.nii.gz", cal_min: 0, cal_max: 255 });
      const overlay = labels && await niivue.NVImage.loadFromBase64({ base64: labels, name: "labels.nii.gz", opacity: 0.4 });
      overlay?.setColormapLabel(LABELS);
      if (number !== chosen) return; // another one was asked for meanwhile
      viewer.volumes.slice().forEach((old) => viewer.removeVolume(old));
      [image, overlay].filter(Boolean).forEach((shown) => viewer.addVolume(shown));
      viewer.setSliceType(viewer.sliceTypeMultiplanar);
    }
    try {
      viewer = new niivue.Niivue({
        backColor: [0, 0, 0, 1], crosshairWidth: 0.5, crosshairColor: [0.34, 0.71, 0.91, 0.6], show3Dcrosshair: false,
        isOrientationTextVisible: false, isColorbar: false, isRadiologicalConvention: true, dragAndDropEnabled: false, logLevel: "error", loadingText: "",
        multiplanarShowRender: niivue.SHOW_RENDER.ALWAYS, heroImageFraction: 0.55, heroSliceType: niivue.SLICE_TYPE.RENDER,
        clipPlaneColor: [0, 0, 0, 0],
      });
      await viewer.attachToCanvas(canvas);
      solids.set(box, () => {
        viewer.cleanup();
        viewer.gl.getExtension("WEBGL_lose_context").loseContext();
      });
      left.observe(box);
      await show(chosen);
      viewer.setRenderAzimuthElevation(200, 35);
      viewer.setClipPlane([0.05, 0, 90]); // cut across the ventricles, so that the 3D view shows their inside
    } catch (error) { // no WebGL: slices are there all the same
      closeSolid(box);
      failed(box, error);
    }
  }
  const left = new IntersectionObserver((entries) => entries.filter((entry) => !entry.isIntersecting).forEach(({ target }) => closeSolid(target)), { rootMargin: "400px" });

  // ---- dials

  function dialled(label, stops, chosen, changed) { // a slider with a button for each of its stops
    const told = element("output", { className: "bk-told" });
    const set = (value) => {
      dial.value = value;
      told.value = stops[value];
      dial.setAttribute("aria-valuetext", stops[value]);
      buttons.forEach((one, i) => one.setAttribute("aria-pressed", i === value));
      changed(value);
    };
    const [labelled, dial] = range(label, { min: 0, max: stops.length - 1, value: chosen, step: 1 }, set);
    const buttons = stops.map((textContent, i) => element("button", { type: "button", textContent, onclick: () => set(i) }));
    return { parts: [element("div", { className: "bk-controls bk-dialled" }, labelled, told), element("div", { className: "bk-stops" }, ...buttons)], set };
  }

  async function drawDial(box) {
    const { models, badge } = content(box);
    const files = await Promise.all(models.map(({ nifti }) => unpacked(nifti)));
    const look = firstLook(files[0].depth);
    let chosen = Math.min(1, models.length - 1);
    const panels = [panel(""), panel(models[0].title), panel("")];
    const words = element("p", { className: "bk-words" });
    const rows = element("tbody");
    const redraw = () => {
      const { title, words: said, measures } = models[chosen];
      panels[0].caption.textContent = `${badge}, ${title}`;
      panels[1].caption.textContent = `${badge}, ${models[0].title}`;
      panels[2].caption.textContent = chosen ? `difference × 3` : "no difference: this is the public model";
      paint(panels[0].canvas, files[chosen], look);
      paint(panels[1].canvas, files[0], look);
      paint(panels[2].canvas, files[chosen], look, null, files[0]);
      panels.forEach(({ canvas, caption }) => canvas.setAttribute("aria-label", `${caption.textContent}, slice ${look.slice + 1}`));
      words.textContent = said;
      rows.replaceChildren(...measures.map(({ name, value, patients }) => element(
        "tr", {}, element("th", { scope: "row", textContent: name }), element("td", { textContent: value }), element("td", { textContent: patients }),
      )));
    };
    const dial = dialled("privacy budget", models.map(({ title }) => title), chosen, (value) => { chosen = value; redraw(); });
    const shared = linked(look, redraw, files[0].depth, false);
    const stage = element("div", { className: "bk-panels" }, ...panels.map(({ canvas, caption }) => element("figure", {}, canvas, caption)));
    stage.setAttribute("role", "group");
    stage.setAttribute("aria-label", "Linked slices: arrow keys move through the volume");
    listen(box, stage, look, shared);
    const head = element("thead", {}, element("tr", {}, ...["measure", "this model", "held-out patients"].map((textContent) => element("th", { scope: "col", textContent }))));
    const table = element("table", {}, element("caption", { textContent: "What was measured of this model" }), head, rows);
    box.querySelectorAll(":scope > img").forEach((still) => still.remove());
    box.append(...dial.parts, words, stage, shared.controls, table);
    box.style.minHeight = 0;
    dial.set(chosen);
  }

  async function drawLevels(box) { // the still picture holds all levels, a row an attribute: it's cut into tiles
    const { attributes, badge, tile, mm } = content(box);
    const still = box.querySelector("img");
    await still.decode();
    const sheet = new OffscreenCanvas(still.naturalWidth, still.naturalHeight).getContext("2d", { willReadFrequently: true });
    sheet.drawImage(still, 0, 0);
    const cut = (row, column) => {
      const { data } = sheet.getImageData(column * tile, row * tile, tile - 2, tile - 2); // 2 pixels lie between tiles
      return { width: tile - 2, height: tile - 2, depth: 1, mm, voxels: data.filter((_, i) => i % 4 === 0) };
    };
    const last = attributes[0].levels.length - 1, middle = Math.floor(last / 2), first = Math.min(middle + 1, last); // one that differs
    const look = { slice: 0, level: 128, window: 255 };
    const volumes = attributes.map(({ levels }, row) => levels.map((_, column) => cut(row, column)));
    const panels = [panel(""), panel(""), panel("")];
    const stage = element("div", { className: "bk-panels" }, ...panels.map(({ canvas, caption }) => element("figure", {}, canvas, caption)));
    const words = element("p", { className: "bk-words" });
    words.setAttribute("aria-live", "polite");
    const place = element("div");
    const show = (row) => {
      const { name, phase, levels } = attributes[row];
      choices.forEach((one, i) => one.setAttribute("aria-pressed", i === row));
      const line = (side, kind) => element("tr", {}, element("th", { scope: "row", textContent: side }), ...levels.map((level) => element(kind, { textContent: level[side] })));
      const table = element("table", {}, element("caption", { textContent: `The ${name}, as it was requested, and as it was measured on the sample` }),
        element("thead", {}, line("requested", "th")), element("tbody", {}, line("measured", "td")));
      const dial = dialled("requested", levels.map(({ requested }) => requested), first, (column) => {
        const { requested, measured } = levels[column];
        panels[0].caption.textContent = `${phase}, requested ${requested}`;
        panels[1].caption.textContent = `${phase}, requested ${levels[middle].requested}`;
        panels[2].caption.textContent = column === middle ? "no difference: this is the middle level" : "difference × 3";
        paint(panels[0].canvas, volumes[row][column], look);
        paint(panels[1].canvas, volumes[row][middle], look);
        paint(panels[2].canvas, volumes[row][column], look, null, volumes[row][middle]);
        panels.forEach(({ canvas, caption }) => canvas.setAttribute("aria-label", `${badge}: ${caption.textContent}`));
        words.textContent = `The ${name}: requested ${requested}, measured ${measured}.`;
        table.querySelectorAll("tr").forEach((cells) => [...cells.children].slice(1).forEach((cell, i) => cell.classList.toggle("bk-chosen", i === column)));
      });
      place.replaceChildren(...dial.parts, scrolling(table));
      dial.set(first);
    };
    const choices = attributes.map(({ name }, i) => element("button", { type: "button", textContent: name, onclick: () => show(i) }));
    still.remove();
    box.append(element("p", { className: "bk-badge", textContent: badge }), element("div", { className: "bk-stops" }, ...choices), stage, words, place);
    box.style.minHeight = 0;
    show(0);
  }

  // ---- the mechanism in motion

  function drawMechanism(box) {
    const draw = (() => { let state = 7; return () => (state = (state * 16807) % 2147483647) / 2147483647; })();
    const normal = () => Math.sqrt(-2 * Math.log(draw())) * Math.cos(2 * Math.PI * draw());
    const patients = Array.from({ length: 60 }, () => [0.9 + 0.8 * normal(), 0.5 + 0.8 * normal()]); // a common direction, and differences
    const noise = [normal(), normal()];
    const look = { C: 1, sigma: 1, N: 12 };
    const drawing = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    drawing.setAttribute("viewBox", "-4 -3 8 6");
    drawing.setAttribute("role", "img");
    const told = element("p", { className: "bk-words" });
    const arrow = ([x, y], colour, wide) => `<line x1="0" y1="0" x2="${x}" y2="${-y}" stroke="${colour}" stroke-width="${wide}" stroke-linecap="round"/>`;
    const length = ([x, y]) => Math.hypot(x, y);
    const redraw = () => {
      const { C, sigma, N } = look;
      const clipped = patients.slice(0, N).map((u) => u.map((part) => part * Math.min(1, C / length(u))));
      const mean = [0, 1].map((k) => clipped.reduce((sum, u) => sum + u[k], 0) / N);
      const hidden = mean.map((part, k) => part + sigma * C / N * noise[k]);
      const reach = sigma * C / N;
      drawing.innerHTML = `<circle r="${C}" fill="none" stroke="#8c959f" stroke-width="0.02" stroke-dasharray="0.08"/>`
        + patients.slice(0, N).map((u) => arrow(u, "#8c959f55", 0.02)).join("") + clipped.map((u) => arrow(u, "#56B4E9", 0.03)).join("")
        + `<circle cx="${mean[0]}" cy="${-mean[1]}" r="${reach}" fill="#D55E0022" stroke="#D55E00" stroke-width="0.02"/>`
        + arrow(mean, "#009E73", 0.06) + arrow(hidden, "#D55E00", 0.06);
      const cut = patients.slice(0, N).filter((u) => length(u) > C).length;
      told.textContent = `${cut} of ${N} gradients are longer than C and are shortened to it. One patient moves the mean by at most C/N = ${(C / N).toFixed(3)}; `
        + `the noise has a standard deviation of σC/N = ${reach.toFixed(3)} in each direction. The mean of the clipped gradients is ${length(mean).toFixed(2)} long: `
        + `signal over noise ${sigma ? (length(mean) / reach).toFixed(1) : "without bound, and no privacy"}. Only the noised mean reaches the model.`;
      drawing.setAttribute("aria-label", told.textContent);
    };
    const sliders = [["clipping norm C", "C", 0.1, 2.5, 0.1], ["noise multiplier σ", "sigma", 0, 8, 0.1], ["patients N", "N", 1, 60, 1]].map(([label, name, min, max, step]) => {
      const shown = element("output", { value: look[name] });
      const [labelled] = range(label, { min, max, step, value: look[name] }, (value) => { look[name] = value; shown.value = value; redraw(); });
      labelled.append(shown);
      return labelled;
    });
    const key = [["#8c959f", "gradients"], ["#56B4E9", "clipped"], ["#009E73", "their mean"], ["#D55E00", "with noise: what reaches the model"]]
      .map(([colour, text]) => { const mark = element("i"); mark.style.background = colour; return element("span", {}, mark, text); });
    box.append(drawing, element("p", { className: "bk-key" }, ...key), element("div", { className: "bk-controls" }, ...sliders), told);
    redraw();
  }

  // ---- when to draw

  const drawings = { "bk-plot": drawPlot, "bk-volumes": drawVolumes, "bk-dial": drawDial, "bk-levels": drawLevels, "bk-mechanism": drawMechanism };
  let turn = Promise.resolve(); // one after the other, those near the screen first
  const draw = (box) => {
    if (box.dataset.begun) return;
    box.dataset.begun = "yes";
    const kind = [...box.classList].find((name) => drawings[name]);
    turn = turn.then(() => drawings[kind](box)).then(() => { box.dataset.drawn = "yes"; }).catch((error) => failed(box, error instanceof Event ? new Error("its library could not be loaded") : error));
  };
  const near = new IntersectionObserver((entries) => entries.filter((entry) => entry.isIntersecting).forEach(({ target }) => {
    near.unobserve(target);
    draw(target);
  }), { rootMargin: "400px" });
  window.drawFigures = (kind) => document.querySelectorAll(kind).forEach((box) => {
    if (!box.dataset.watched) near.observe(box);
    box.dataset.watched = "yes";
  });
  if (window.bkLibraries) return; // in a live notebook outputs ask for what they hold
  const every = Object.keys(drawings).map((name) => `.${name}`);
  every.forEach(drawFigures);
  const rest = () => document.querySelectorAll(every).forEach(draw); // nothing prints blank
  window.addEventListener("beforeprint", rest);

  function mend() { // what the theme's own elements tell a screen reader
    document.querySelectorAll(".search-button-field, details > summary").forEach((one) => one.removeAttribute("aria-label")); // their text says it
    document.querySelectorAll(".theme-switch-button").forEach((button) => { // its icons' titles say another name than its own
      const hide = () => [...button.children].forEach((icon) => {
        icon.setAttribute("aria-hidden", true);
        icon.removeAttribute("title");
        icon.querySelector("title")?.remove();
      });
      hide();
      new MutationObserver(hide).observe(button, { childList: true, subtree: true }); // Font Awesome draws the icons when it likes
    });
    document.querySelectorAll("[role=doc-biblioentry]").forEach((entry) => entry.setAttribute("role", "listitem"));
  }

  window.addEventListener("load", () => {
    mend();
    setTimeout(rest, 1500);
    document.querySelectorAll(".bd-article table").forEach((table) => {
      if (table.closest(".bk-scroll, .bk-dial")) return;
      const place = document.createComment("");
      table.replaceWith(place);
      place.replaceWith(scrolling(table));
    });
    if (document.querySelector(".math") && !window.MathJax?.startup?.promise) {
      document.querySelector("article h1").after(lacking("The equations on this page are shown as TeX", "MathJax"));
    }
  });
})();
