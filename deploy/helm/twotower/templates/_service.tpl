{{/* Names, and numbers that follow from the service's settings. */}}

{{- define "twotower.name" -}}
{{- if gt (len .Release.Name) 47 -}}
{{- fail (printf "release name: got %s, which has %d characters; KubeRay takes at most 47" .Release.Name (len .Release.Name)) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" .Release.Name) -}}
{{- fail (printf "release name: got %s; KubeRay wants letters, digits and '-', a letter first" .Release.Name) -}}
{{- end -}}
{{- .Release.Name -}}
{{- end -}}

{{- define "twotower.labels" -}}
app.kubernetes.io/name: twotower
{{ include "twotower.selector" . }}
{{- end -}}

{{/* Of all pods. Not app.kubernetes.io/name: KubeRay's Service of the head selects pods by its own. */}}
{{- define "twotower.selector" -}}
app.kubernetes.io/instance: {{ include "twotower.name" . }}
app.kubernetes.io/part-of: twotower
{{- end -}}

{{- define "twotower.image" -}}
{{- with .Values.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag }}{{ end }}
{{- end -}}
{{- end -}}

{{- define "twotower.cell.processes" -}}
{{- with .Values.settings.cell -}}
{{ if eq .placement "split" }}{{ add 1 (int (default 1 .denoisers_per_context)) }}{{ else }}1{{ end }}
{{- end -}}
{{- end -}}

{{/* GPUs of a cell: as many as actors/settings.py asks Ray for. */}}
{{- define "twotower.cell.gpus" -}}
{{- with .Values.settings.cell -}}
{{ if eq .device "cuda" }}{{ mul (int (include "twotower.cell.processes" $)) (int (default 1 .gpus_per_tower)) }}{{ else }}0{{ end }}
{{- end -}}
{{- end -}}

{{- define "twotower.tls.directory" -}}/etc/twotower-tls{{- end -}}
{{- define "twotower.clientCa.directory" -}}/etc/twotower-client-ca{{- end -}}

{{/* Takes (dict "root" $ "ingress" a copy of the settings'): puts the files of TLS into the copy. */}}
{{- define "twotower.tls.settings" -}}
{{- with .root.Values.tls -}}
{{- if .secretName -}}
{{- $_ := set $.ingress "tls_cert_file" (printf "%s/%s" (include "twotower.tls.directory" $) .certificate) -}}
{{- $_ := set $.ingress "tls_key_file" (printf "%s/%s" (include "twotower.tls.directory" $) .key) -}}
{{- with .grpcClientCa -}}
{{- $_ := set $.ingress "grpc_client_ca_file" (printf "%s/%s" (include "twotower.clientCa.directory" $) .key) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "twotower.check" -}}
{{- $cluster := .Values.settings.cluster -}}
{{- $checkpoint := .Values.settings.model.checkpoint -}}
{{- if gt (int $cluster.min_cells) (int $cluster.max_cells) -}}
{{- fail (printf "settings.cluster.min_cells: got %d, which is more than max_cells (%d)" (int $cluster.min_cells) (int $cluster.max_cells)) -}}
{{- end -}}
{{- if and (eq .Values.settings.cell.device "cpu") (gt (int $cluster.max_cells) 1) -}}
{{- fail (printf "settings.cluster.max_cells: got %d with device cpu, wanted 1: cells on CPUs would share a pod" (int $cluster.max_cells)) -}}
{{- end -}}
{{- if and (eq .Values.settings.cell.device "cuda") (ne (gt (int .Values.cells.surgePods) 0) $cluster.surge) -}}
{{- fail (printf "cells.surgePods: got %d with settings.cluster.surge %v; new cells that start before old ones go need pods, others need none" (int .Values.cells.surgePods) $cluster.surge) -}}
{{- end -}}
{{- if and (ne .Values.settings.cell.placement "split") (gt (int (default 1 .Values.settings.cell.denoisers_per_context)) 1) -}}
{{- fail (printf "settings.cell.denoisers_per_context: got %d with placement %s, wanted 1" (int .Values.settings.cell.denoisers_per_context) .Values.settings.cell.placement) -}}
{{- end -}}
{{- if and (not (include "twotower.weights.volume" .)) (or .Values.weights.init (ne $checkpoint "demo")) -}}
{{- fail (printf "weights.claim: got none, wanted one, or a weights.volume, for settings.model.checkpoint %s" $checkpoint) -}}
{{- end -}}
{{- if and (ne $checkpoint "demo") (not (hasPrefix (printf "%s/" .Values.weights.mountPath) $checkpoint)) -}}
{{- fail (printf "settings.model.checkpoint: got %s, wanted a directory in weights.mountPath (%s), or demo" $checkpoint .Values.weights.mountPath) -}}
{{- end -}}
{{- $ingress := .Values.settings.ingress -}}
{{- range $name := list "tls_cert_file" "tls_key_file" "grpc_client_ca_file" -}}
{{- if get $ingress $name -}}
{{- fail (printf "settings.ingress.%s: got %s, wanted tls.secretName or tls.grpcClientCa, which mount the file in every pod that reads it" $name (get $ingress $name)) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.tls.grpcClientCa (not .Values.tls.secretName) -}}
{{- fail "tls.grpcClientCa: got one without tls.secretName, the service's own certificate" -}}
{{- end -}}
{{- if and (or .Values.routes.http .Values.routes.grpc) (not .Values.routes.parentRefs) -}}
{{- fail "routes.parentRefs: got none, wanted the Gateway that the routes are for" -}}
{{- end -}}
{{- end -}}

{{/* The drain: a node's Ray waits for what it runs, then Kubernetes ends the pod. The head outlives all others. */}}
{{- define "twotower.drain.cell" -}}{{ int .Values.settings.cluster.drain_timeout_s }}{{- end -}}
{{- define "twotower.drain.worker" -}}{{ add (include "twotower.drain.cell" .) 30 }}{{- end -}}
{{- define "twotower.grace.worker" -}}{{ add (include "twotower.drain.cell" .) 60 }}{{- end -}}
{{- define "twotower.drain.head" -}}{{ include "twotower.grace.worker" . }}{{- end -}}
{{- define "twotower.grace.head" -}}{{ add (include "twotower.drain.cell" .) 90 }}{{- end -}}
