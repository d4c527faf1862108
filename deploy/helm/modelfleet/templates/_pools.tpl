{{/*
The pools by name, as YAML: the defaults with what each pool says. Structured keys are merged, free ones replaced. A pool
that is null was removed by a later file.
*/}}
{{- define "modelfleet.pools" -}}
{{- $structured := list "gpu" "image" "shm" "cache" "batch" "memory" "startup" "rollout" "autoscaling" "podDisruptionBudget" -}}
{{- $pools := dict -}}
{{- range $name, $own := .Values.inference.pools -}}
{{- if not (kindIs "invalid" $own) -}}
{{- $pool := deepCopy $.Values.inference.poolDefaults -}}
{{- range $key, $value := $own -}}
{{- if has $key $structured -}}
{{- $block := get $pool $key -}}
{{- range $inner, $given := $value -}}{{- $_ := set $block $inner $given -}}{{- end -}}
{{- else -}}
{{- $_ := set $pool $key $value -}}
{{- end -}}
{{- end -}}
{{- $_ := set $pools $name $pool -}}
{{- end -}}
{{- end -}}
{{ toYaml $pools }}
{{- end -}}

{{/* The volume of a pool's cache. */}}
{{- define "modelfleet.cacheVolume" -}}
{{- if eq .kind "emptyDir" }}
- name: cache
  emptyDir: {sizeLimit: {{ .size }}}
{{- else if eq .kind "ephemeral" }}
- name: cache
  ephemeral:
    volumeClaimTemplate:
      spec:
        accessModes: [ReadWriteOnce]
        {{- with .storageClassName }}
        storageClassName: {{ . }}
        {{- end }}
        resources: {requests: {storage: {{ .size }}}}
{{- else if eq .kind "persistentVolumeClaim" }}
- name: cache
  persistentVolumeClaim: {claimName: {{ .existingClaim }}}
{{- else }}
- name: cache
  hostPath: {path: {{ .hostPath }}, type: DirectoryOrCreate}
{{- end }}
{{- end -}}
